"""A quantized state back to a dense one: the ordinary state dict of the stock model."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..layers.adopt import STATE_PARTS
from ..layers.inputs import NAME as INPUT_QUANTIZER
from ..layers.latent import LatentIntWeight
from ..layers.parts import AFFINE, CENTROID_BITS, CENTROIDS, CODES, FILE_AFFINE, SPEC
from ..layers.pq import PQWeight
from ..layers.quantized import parts_of
from ..layers.scalar import IntWeight, spec_of


def dense_state(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    """`state` with every quantized tensor decoded as evaluation sees it; tied copies share one tensor.

    The rounding of inputs has no place in a dense state and is left out.

    Args:
        state: of a quantized model (from a packed file or a checkpoint), or of a dense one, which comes back as it is.
        shapes: of the dense tensors that are not matrices (convolutions), by name.
    """
    owners = {name.rpartition(".")[0] for name in state if name.rpartition(".")[2] in (CENTROIDS, AFFINE)}
    quantized = {
        name
        for name in owners
        if f"{name}.{SPEC}" in state or (f"{name}.{CODES}" in state and f"{name}.{CENTROIDS}" in state)
    }
    dense: dict[str, Tensor] = {}
    decoded: dict[tuple[int, ...], Tensor] = {}
    for name, tensor in state.items():
        owner, _, last = name.rpartition(".")
        owner = owner if owner in quantized and last in STATE_PARTS else name
        if f".{INPUT_QUANTIZER}." in f".{name}" or owner in dense:
            continue
        if owner not in quantized:
            dense[name] = tensor
            continue
        parts = parts_of(state, owner, STATE_PARTS)
        latent = state.get(owner)
        key = tuple(t.data_ptr() for t in (latent, *(parts.get(p) for p in (CODES, CENTROIDS))) if t is not None)
        if key not in decoded:
            decoded[key] = _decode(latent, parts)
        dense[owner] = decoded[key].view((shapes or {}).get(owner, decoded[key].shape))
    return dense


@torch.no_grad()
def _decode(latent: Tensor | None, parts: Mapping[str, Tensor]) -> Tensor:
    """The weight that evaluation sees; of pq as a matrix (rows, row)."""
    if latent is not None:
        bits, range_ = spec_of(parts)
        return LatentIntWeight(nn.Parameter(latent, requires_grad=False), bits, range_).eval().decode()
    if CENTROIDS in parts:
        codes, centroids = parts[CODES], parts[CENTROIDS]
        shape = (codes.shape[0], codes.numel() // codes.shape[0] * centroids.shape[1])
        return (
            PQWeight(codes, centroids, shape, int(parts.get(CENTROID_BITS, 16)), parts.get(FILE_AFFINE)).eval().decode()
        )
    return IntWeight(parts[CODES], parts[AFFINE], spec_of(parts)[0]).decode()
