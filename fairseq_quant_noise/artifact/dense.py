"""A quantized state back to a dense one: the ordinary state dict of the stock model."""

from collections.abc import Mapping

from torch import Tensor

from ..layers.quantized import CENTROIDS, CODES


def dense_state(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    """`state` with every pair X.codes, X.centroids decoded into X; tied copies share one tensor.

    Args:
        state: of a quantized model (from a packed file or a checkpoint), or of a dense one, which comes back as it is.
        shapes: of the dense tensors that are not matrices (convolutions), by name.
    """
    dense: dict[str, Tensor] = {}
    decoded: dict[tuple[int, int], Tensor] = {}
    for name, tensor in state.items():
        owner, _, last = name.rpartition(".")
        if last == CENTROIDS and f"{owner}.{CODES}" in state:
            continue
        if last == CODES and f"{owner}.{CENTROIDS}" in state:
            centroids = state[f"{owner}.{CENTROIDS}"]
            key = (tensor.data_ptr(), centroids.data_ptr())
            if key not in decoded:
                decoded[key] = _decode(tensor, centroids)
            dense[owner] = decoded[key].view((shapes or {}).get(owner, decoded[key].shape))
        else:
            dense[name] = tensor
    return dense


def _decode(codes: Tensor, centroids: Tensor) -> Tensor:
    """(rows, blocks a row) codes and (K, d) centroids to the (rows, row) weight, centroids as the file holds them."""
    stored = centroids.half().to(centroids.dtype)
    return stored.index_select(0, codes.flatten().long()).view(codes.shape[0], -1)
