"""edgeattn: from a transformer checkpoint to a bundle proven in PyTorch, ONNX Runtime, TensorRT.

Importing this package loads neither torch nor tensorrt nor onnxruntime.
"""

__version__ = "0.1.0"
