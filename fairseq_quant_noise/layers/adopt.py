"""A model made ready for a state that holds quantized weights."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..weights import Weight, find_weights
from .inputs import adopt_input_quantizers
from .pq import CENTROID_BITS, CENTROIDS, CODES, FILE_AFFINE, PQWeight
from .quantized import QuantizedWeight, parts_of, swap_in
from .scalar import AFFINE, SPEC, IntWeight, LatentIntWeight, spec_of, to_int_

_PARTS = (CODES, CENTROIDS, CENTROID_BITS, FILE_AFFINE, AFFINE, SPEC)


def adopt_quantized(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Make every weight of `model` that `state` holds quantized a quantized one, ready to load `state`.

    Returns:
        The names of the modules that changed.
    Raises:
        UserError: the codes do not fit the weight's shape.
    """
    changed = []
    for weight in find_weights(model):
        parts = parts_of(state, weight.tensor_name, _PARTS)
        if CODES in parts or SPEC in parts:
            stored = weight.stored
            if isinstance(stored, LatentIntWeight) and CODES not in parts:
                continue
            if isinstance(stored, QuantizedWeight) and CODES in parts and not isinstance(stored, LatentIntWeight):
                continue
            _adopt(weight, parts)
            changed.append(weight.name)
    adopt_input_quantizers(model, state)
    return changed


def _adopt(weight: Weight, parts: Mapping[str, Tensor]) -> None:
    shape, device, dtype = weight.shape, _device(weight), torch.float32
    if CODES not in parts:
        bits, range_ = spec_of(parts)
        to_int_(weight, bits, range_)
    elif CENTROIDS in parts:
        codes, centroids = parts[CODES], parts[CENTROIDS]
        if centroids.dim() != 2 or codes.numel() * centroids.shape[1] != math.prod(shape):
            raise UserError(
                f"{weight.name}: codes of shape {tuple(codes.shape)} and centroids of shape {tuple(centroids.shape)} "
                f"do not fit a weight of shape {shape}; the file is of another architecture"
            )
        bits = int(parts[CENTROID_BITS]) if CENTROID_BITS in parts else 16
        empty = torch.empty_like(centroids, dtype=dtype, device=device)
        affine = parts.get(FILE_AFFINE)
        affine = None if affine is None else torch.empty_like(affine, device=device)
        swap_in(weight, PQWeight(torch.empty_like(codes, device=device), empty, shape, bits, affine))
    elif AFFINE in parts and SPEC in parts:
        codes, affine = parts[CODES], parts[AFFINE]
        if tuple(codes.shape) != shape:
            raise UserError(
                f"{weight.name}: codes of shape {tuple(codes.shape)} do not fit a weight of shape {shape}; "
                "the file is of another architecture"
            )
        bits, _ = spec_of(parts)
        swap_in(
            weight, IntWeight(torch.empty_like(codes, device=device), torch.empty_like(affine, device=device), bits)
        )


def _device(weight: Weight) -> torch.device:
    stored = weight.stored
    return next(stored.parameters()).device if isinstance(stored, nn.Module) else stored.device
