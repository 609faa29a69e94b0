"""From a model to an ONNX graph: trace one block, stamp it per layer, bind weights, check."""
