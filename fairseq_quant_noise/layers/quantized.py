"""A weight held as a codebook and codes, in place of the Parameter of a Linear, Embedding, Conv2d or tied softmax.

    W_hat[block i] = centroids[codes[i]]                    (arXiv 2004.07320, equation 3; d numbers a block)

It is a module of the name `weight`, so a checkpoint holds `….fc1.weight.codes` and `….fc1.weight.centroids`. Every
holder of a tied weight holds the same PQWeight: quantized once, stored once, fine-tuned once.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..access import intercept
from ..errors import UserError
from ..weights import Weight, find_weights

CODES, CENTROIDS = "codes", "centroids"


class _Lookup(torch.autograd.Function):
    """centroids[codes], with the gradient of a centroid averaged over the blocks that use it.

    The sum that autograd would give grows with a cluster's size, so that one learning rate cannot fit all clusters
    (kill-the-bits averages too, arXiv 1907.05686 section 3.4).
    """

    @staticmethod
    def forward(ctx: Any, centroids: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.n_centroids = centroids.shape[0]
        return centroids.index_select(0, codes)  # (n, d)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (codes,) = ctx.saved_tensors
        gradient = gradients[0].float()  # sums over thousands of blocks overflow or drown in half precision
        total = gradient.new_zeros(ctx.n_centroids, gradient.shape[1]).index_add_(0, codes, gradient)  # (K, d)
        count = torch.bincount(codes, minlength=ctx.n_centroids).clamp_(min=1).unsqueeze(1)  # (K, 1)
        return (total / count).to(gradients[0].dtype), None


class PQWeight(nn.Module):
    """A product-quantized weight.

    Args:
        codes: (rows, blocks a row) uint8, each below K.
        centroids: (K, d).
        shape: of the dense weight.
    """

    def __init__(self, codes: Tensor, centroids: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer(CODES, codes)
        self.centroids = nn.Parameter(centroids)
        self.shape = torch.Size(shape)

    codes: Tensor

    @property
    def block_size(self) -> int:
        """d."""
        return self.centroids.shape[1]

    @property
    def n_centroids(self) -> int:
        """K."""
        return self.centroids.shape[0]

    def stored_centroids(self) -> Tensor:
        """The centroids as the file holds them: rounded to fp16, in the model's own dtype."""
        return self.centroids.half().to(self.centroids.dtype)

    def decode(self) -> Tensor:
        """The dense weight; in eval mode from the centroids as the file holds them, so that scores agree."""
        codes = self.codes.flatten().long()
        if self.training:
            return _Lookup.apply(self.centroids, codes).view(self.shape)
        return self.stored_centroids().index_select(0, codes).view(self.shape)

    def extra_repr(self) -> str:
        """Shape, block size and codebook size, for printing."""
        return f"shape={tuple(self.shape)}, block_size={self.block_size}, n_centroids={self.n_centroids}"


def quantize_weight_(weight: Weight, codes: Tensor, centroids: Tensor) -> PQWeight:
    """Put codes and centroids in the place of a stored weight, for its owner and every alias; returns the new weight.

    Args:
        weight: a weight of the model, not quantized yet.
        codes: (rows, blocks a row) uint8.
        centroids: (K, d), taken in the dtype of the stored weight.
    """
    stored = weight.stored
    if isinstance(stored, nn.Module):
        raise UserError(f"{weight.name} is quantized already; a plan may quantize a weight once")
    quantized = PQWeight(codes.to(stored.device), centroids.to(stored), tuple(stored.shape))
    quantized.train(weight.module.training)
    for _, module in weight.holders:
        intercept(module)
        del module._parameters["weight"]
        module.__dict__.pop("_weight_noise", None)
        module._modules["weight"] = quantized
    return quantized


def adopt_quantized(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Make every weight of `model` that `state` holds as codes a quantized one, ready to load `state`.

    Returns:
        The names of the modules that changed.
    Raises:
        UserError: the codes do not fit the weight's shape.
    """
    changed = []
    for weight in find_weights(model):
        codes = state.get(f"{weight.tensor_name}.{CODES}")
        centroids = state.get(f"{weight.tensor_name}.{CENTROIDS}")
        if codes is None or centroids is None or isinstance(weight.stored, nn.Module):
            continue
        if centroids.dim() != 2 or codes.numel() * centroids.shape[1] != math.prod(weight.shape):
            raise UserError(
                f"{weight.name}: codes of shape {tuple(codes.shape)} and centroids of shape {tuple(centroids.shape)} "
                f"do not fit a weight of shape {weight.shape}; the file is of another architecture"
            )
        quantize_weight_(weight, torch.empty_like(codes), torch.empty_like(centroids, dtype=torch.float32))
        changed.append(weight.name)
    return changed


def quantized_weights(model: nn.Module) -> dict[str, PQWeight]:
    """The quantized weights of `model`, each once, by the owner's module name."""
    return {w.name: w.stored for w in find_weights(model) if isinstance(w.stored, PQWeight)}
