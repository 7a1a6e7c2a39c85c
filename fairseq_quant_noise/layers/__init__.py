"""Quantized weights inside a model: the module keeps its type and its name, and its weight is decoded when read."""

from importlib import import_module
from pkgutil import iter_modules

from .adopt import adopt_quantized
from .inputs import calibrating, input_quantizers, quantize_inputs_, warn_of_unrounded
from .latent import LatentIntWeight, to_int_
from .pq import PQWeight, quantize_weight_
from .pq_latent import LatentPQWeight
from .quantized import QuantizedWeight, quantized_weights
from .registry import join_
from .scalar import IntWeight

__all__ = [
    "IntWeight",
    "LatentIntWeight",
    "LatentPQWeight",
    "PQWeight",
    "QuantizedWeight",
    "adopt_quantized",
    "calibrating",
    "input_quantizers",
    "join_",
    "quantize_inputs_",
    "quantize_weight_",
    "quantized_weights",
    "to_int_",
    "warn_of_unrounded",
]

for _module in iter_modules(__path__):  # each one that has a format registers it
    import_module(f"{__name__}.{_module.name}")
