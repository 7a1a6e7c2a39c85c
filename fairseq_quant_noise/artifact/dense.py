"""Decode a quantized state into a dense one: the ordinary state dict of the stock model."""

from collections.abc import Container, Mapping

import torch
from torch import Tensor

from ..errors import UserError
from ..layers.inputs import NAME as INPUT_QUANTIZER
from ..layers.registry import Held, weights_in


@torch.no_grad()
def dense_state(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]] | None = None, turned: Container[str] = ()
) -> dict[str, Tensor]:
    """`state` with every quantized tensor decoded as evaluation sees it; tied copies share one tensor.

    The rounding of inputs has no place in a dense state and is left out.

    Args:
        state: of a quantized model (from a packed file or a checkpoint), or of a dense one, which comes back as it is.
        shapes: of the dense tensors that are not matrices (convolutions), by name, as their codes lie.
        turned: the names of those pq weights whose modules store them with the first two dimensions exchanged.

    Returns:
        By name, each tensor in its dense shape; without an entry in `shapes` a pq weight is (rows, columns).

    Raises:
        UserError: a weight in training holds NaN or infinity.
        DamagedFileError: an entry that says the bits and the range of codes holds something else.
    """
    dense: dict[str, Tensor] = {}
    decoded: dict[tuple[int, ...], Tensor] = {}
    for name, stored in weights_in(state).items():
        if f".{INPUT_QUANTIZER}." in f".{name}":
            continue
        if not isinstance(stored, Held):
            dense[name] = stored
            continue
        key = tuple(part.data_ptr() for part in stored.parts.values())
        if key not in decoded:
            decoded[key] = _decoded(name, stored)
        seen = decoded[key].reshape((shapes or {}).get(name, decoded[key].shape))
        dense[name] = seen.transpose(0, 1) if name in turned else seen
    return dense


def _decoded(name: str, stored: Held) -> Tensor:
    """The dense weight, (rows, …); an error gets the tensor's name."""
    try:
        return stored.dense()
    except UserError as error:
        raise type(error)(f"{name}: {error}") from None
