"""From an ONNX graph to a TensorRT engine: the only room that imports TensorRT."""
