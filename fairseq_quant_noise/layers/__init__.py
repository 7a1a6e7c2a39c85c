"""Quantized weights inside a model: the module keeps its type and its name, and its weight is decoded when read."""

from .adopt import adopt_quantized
from .inputs import calibrating, input_quantizers, quantize_inputs_
from .latent import LatentIntWeight, to_int_
from .pq import PQWeight, quantize_weight_, share_codebooks_
from .quantized import QuantizedWeight, quantized_weights
from .scalar import IntWeight

__all__ = [
    "IntWeight",
    "LatentIntWeight",
    "PQWeight",
    "QuantizedWeight",
    "adopt_quantized",
    "calibrating",
    "input_quantizers",
    "quantize_inputs_",
    "quantize_weight_",
    "quantized_weights",
    "share_codebooks_",
    "to_int_",
]
