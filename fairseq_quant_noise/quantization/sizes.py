"""The size of a model as it is now, by the paper's accounting: while the stages run, part dense, part quantized."""

from torch import nn

from ..layers import QuantizedWeight
from ..weights.discovery import find_weights
from .table import rest_bits


def model_bytes(model: nn.Module) -> tuple[float, int]:
    """(bytes now, bytes if all were dense): quantized weights as `table.py` counts them, 4 bytes a number elsewhere."""
    stored = [weight.stored for weight in find_weights(model)]
    quantized = [s for s in stored if isinstance(s, QuantizedWeight)]
    inside = {id(p) for weight in quantized for p in weight.parameters()}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    schemes = [s.scheme if isinstance(s, QuantizedWeight) else "dense" for s in stored]
    now = rest * rest_bits(schemes) / 8 + sum(weight.paper_bytes for weight in quantized)
    return now, 4 * (rest + sum(weight.shape.numel() for weight in quantized))
