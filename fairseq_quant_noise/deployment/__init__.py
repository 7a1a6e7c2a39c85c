"""Write the network of a packed file as an ONNX model, which onnxruntime and others run without torch."""

from .model import onnx_model

__all__ = ["onnx_model"]
