"""edgeattn: from a transformer checkpoint to a proven bundle for PyTorch, ONNX Runtime and TensorRT.

Importing this package loads neither torch nor tensorrt nor onnxruntime.
"""

__version__ = "0.1.0"
