"""Encode the weights of a model again while it trains, where their codes train (`layers/pq_latent.py`)."""

from typing import Any

import torch
from torch import nn

from ..layers import LatentPQWeight, quantized_weights
from ..plan.rules import Codes
from ..utils.autograd import in_backward


def trained_weights(model: nn.Module) -> dict[str, LatentPQWeight]:
    """The weights of `model` whose codes train, each once, by the owner's module name."""
    return {name: weight for name, weight in quantized_weights(model).items() if isinstance(weight, LatentPQWeight)}


def encode_again(model: nn.Module, share: float = 1.0) -> float:
    """Find the codes of all these weights anew, each by its latent weight as it is now; returns the share that changed.

    Args:
        model: any network; without codes that train, nothing happens, and 0 is returned.
        share: of each weight's blocks, those that moved away from their centroid most; 1 for all.
    """
    weights = trained_weights(model).values()
    changed = [weight.encode_again(share) for weight in weights]
    codes = sum(weight.codes.numel() for weight in weights)
    return float(torch.stack(changed).sum()) / codes if changed else 0.0


@torch.no_grad()
def latent_error(model: nn.Module) -> float | None:
    """||W_hat - latent|| / ||latent|| over all these weights together; None where no codes train."""
    parts = [weight.error() for weight in trained_weights(model).values()]
    if not parts:
        return None
    away, whole = torch.stack(parts).sum(0).tolist()
    return float((away / max(whole, 1e-30)) ** 0.5)


class _BeforeForward:
    """A forward pre-hook of a model whose codes train; it counts training forwards as updates."""

    def __init__(self, codes: Codes) -> None:
        self.codes = codes
        self.forwards = 0

    def __call__(self, model: nn.Module, inputs: Any) -> None:
        """Encode again where it is due."""
        if not (model.training and torch.is_grad_enabled()) or in_backward():
            return
        if self.forwards and self.forwards % self.codes.every == 0:
            encode_again(model, self.codes.share)
        self.forwards += 1


def encode_in_training(model: nn.Module, codes: Codes) -> None:
    """From now on encode again before every so many training forwards of `model` (not of a part of it)."""
    model.register_forward_pre_hook(_BeforeForward(codes))
