"""Quantized weights inside a model: the module keeps its type and its name, and its weight is decoded when read."""

from .quantized import PQWeight, adopt_quantized, quantize_weight_, quantized_weights

__all__ = ["PQWeight", "adopt_quantized", "quantize_weight_", "quantized_weights"]
