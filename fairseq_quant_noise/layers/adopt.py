"""A model made ready for a state that holds quantized weights."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..weights.discovery import Weight, find_weights
from .inputs import adopt_input_quantizers
from .latent import LatentIntWeight, set_spec, to_int_
from .parts import AFFINE, AGE, CENTROID_BITS, CENTROIDS, CODEBOOK, CODES, FILE_AFFINE, SPEC
from .pq import PQWeight, is_multiplied, share_codebooks_
from .quantized import QuantizedWeight, parts_of, quantized_weights, swap_in
from .scalar import IntWeight, spec_of

#: What a state holds of a quantized weight, by the last part of the name.
STATE_PARTS = (CODES, CENTROIDS, CENTROID_BITS, CODEBOOK, FILE_AFFINE, AFFINE, SPEC, AGE)


def adopt_quantized(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Make every weight of `model` that `state` holds quantized one of that form, ready to load `state`.

    Returns:
        The names of the modules that changed.
    Raises:
        UserError: the codes do not fit the weight's shape, or a weight in training would have to come from codes.
    """
    changed = []
    for weight in find_weights(model):
        parts = parts_of(state, weight.tensor_name, STATE_PARTS)
        if CODES in parts and CENTROIDS in parts:
            adopted = _adopt_pq(weight, parts)
        elif CODES in parts and AFFINE in parts and SPEC in parts:
            adopted = _adopt_int(weight, parts)
        else:
            adopted = SPEC in parts and _adopt_latent(weight, parts)
        if adopted:
            changed.append(weight.name)
    share_codebooks_(quantized_weights(model).values())
    adopt_input_quantizers(model, state)
    return changed


def _adopt_pq(weight: Weight, parts: Mapping[str, Tensor]) -> bool:
    codes, centroids = parts[CODES], parts[CENTROIDS]
    if centroids.dim() != 2 or codes.numel() * centroids.shape[1] != math.prod(weight.shape):
        raise UserError(
            f"{weight.name}: codes of shape {tuple(codes.shape)} and centroids of shape {tuple(centroids.shape)} "
            f"do not fit a weight of shape {weight.shape}; the file is of another architecture or dictionary"
        )
    bits, affine = int(parts.get(CENTROID_BITS, 16)), parts.get(FILE_AFFINE)
    codebook = int(parts[CODEBOOK]) if CODEBOOK in parts else None
    stored = weight.stored
    if isinstance(stored, PQWeight):
        there = stored.bits, stored.file_affine is None, stored.codebook_number
        if there == (bits, affine is None, codebook):
            return False
    on = _device(stored)
    new = PQWeight(
        torch.empty_like(codes, device=on),
        torch.empty_like(centroids, dtype=stored.dtype, device=on),  # type: ignore[arg-type]
        weight.shape,
        bits,
        None if affine is None else torch.empty_like(affine, device=on),
        codebook,
        is_multiplied(weight),
    )
    swap_in(weight, new)
    return True


def _adopt_int(weight: Weight, parts: Mapping[str, Tensor]) -> bool:
    codes, stored, (bits, _) = parts[CODES], weight.stored, spec_of(parts)
    if tuple(codes.shape) != weight.shape:
        raise UserError(
            f"{weight.name}: codes of shape {tuple(codes.shape)} do not fit a weight of shape {weight.shape}; "
            "the file is of another architecture or dictionary"
        )
    if isinstance(stored, IntWeight) and stored.bits == bits and stored.affine.shape == parts[AFFINE].shape:
        return False
    on = _device(stored)
    empty = torch.empty_like(parts[AFFINE], device=on)
    swap_in(weight, IntWeight(torch.empty_like(codes, device=on), empty, bits, stored.dtype))  # type: ignore[arg-type]
    return True


def _adopt_latent(weight: Weight, parts: Mapping[str, Tensor]) -> bool:
    stored, (bits, range_) = weight.stored, spec_of(parts)
    if isinstance(stored, LatentIntWeight):
        if (stored.bits, stored.range) == (bits, range_):
            return False
        set_spec(weight, stored, bits, range_)
        return True
    if isinstance(stored, nn.Module):
        raise UserError(f"{weight.name}: holds codes and cannot take a weight in training; load it into a dense model")
    to_int_(weight, bits, range_)
    return True


def _device(stored: Tensor | nn.Module) -> torch.device:
    assert isinstance(stored, Tensor | QuantizedWeight)
    return stored.device
