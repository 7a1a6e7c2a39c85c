"""The size of a model as it is now, by the paper's accounting: while the stages run, part dense, part quantized."""

from torch import nn

from .layers import PQWeight
from .table import pq_bytes


def model_bytes(model: nn.Module) -> tuple[float, int]:
    """(bytes now, bytes if all were dense): codes and fp16 centroids where quantized, 4 bytes a number elsewhere."""
    dense = 4 * sum(p.numel() for p in model.parameters())
    now = float(dense)
    for module in model.modules():
        if isinstance(module, PQWeight):
            now += pq_bytes(module.codes.numel(), module.block_size, module.n_centroids)
            now -= 4 * module.centroids.numel()
            dense += 4 * (module.shape.numel() - module.centroids.numel())
    return now, dense
