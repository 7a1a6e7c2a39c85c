"""Estimate the running statistics of batch normalisation anew, on the quantized network.

The mean and variance of a channel in the dense network are not those in its quantized one: the error of the weights
moves them in the same way for all inputs, and more from layer to layer. A published EfficientNet-Lite0 falls to chance
by that alone; statistics of a few hundred images without labels bring half of its accuracy back. In training with noise
`noise/statistics.py` keeps them right.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError
from ..utils import ranks
from ..utils.modes import evaluating

_ONE_VALUE = "Expected more than 1 value per channel"  # torch, of a batch that has no variance


def batch_norms(model: nn.Module) -> dict[str, Any]:
    """The batch normalisations of `model` that evaluate with running statistics, by name."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm))
    return {name: norm for name, norm in found if norm.track_running_stats and norm.running_mean is not None}


@contextmanager
def estimating(model: nn.Module) -> Iterator[None]:
    """Replace the running statistics of `model` by their mean over the forwards inside, each of one batch.

    Batch normalisation alone is in training mode inside: noise and dropout are off. In a distributed run all processes
    end with the mean over the batches of all of them. A layer that no forward reaches keeps the statistics it had.

    Raises:
        UserError: no forward reached any batch normalisation, a batch has one value a channel, or a mean is not finite.
            The model then has the statistics from before, as after any other error.
    """
    norms = batch_norms(model)
    before = {name: [buffer.clone() for buffer in _buffers(norm)] for name, norm in norms.items()}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    reached: set[str] = set()
    try:
        with _enough_values(), evaluating(model):
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None  # all batches count alike, where a momentum would weigh the last ones most
                norm.training = True
            yield
        _mean_over_ranks(list(norms.values()))
        _check(norms)
        reached = {name for name, norm in norms.items() if norm.num_batches_tracked}
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
            for buffer, old in zip(_buffers(norm), before[name], strict=True):
                if name not in reached:
                    buffer.copy_(old)


@contextmanager
def by_batch(model: nn.Module) -> Iterator[None]:
    """Normalise by the statistics of each batch inside; the running ones stay as they are.

    As they are estimated anew on the quantized network, an error of a weight that moves or scales all values of a
    channel costs nothing, and nothing may be predicted for it: with the dense network's statistics, the gradients of
    EfficientNet-Lite0 misjudge what a weight costs by a factor of 2.7, with those of each batch by one of 1.3.

    Raises:
        UserError: a batch has one value a channel.
    """
    norms = batch_norms(model)
    before = [(norm, norm.training, [buffer.clone() for buffer in _buffers(norm)]) for norm in norms.values()]
    for norm in norms.values():
        norm.training = True
    try:
        with _enough_values():
            yield
    finally:
        for norm, training, buffers in before:
            norm.training = training
            for buffer, old in zip(_buffers(norm), buffers, strict=True):
                buffer.copy_(old)


@contextmanager
def _enough_values() -> Iterator[None]:
    """Name what is wrong where a batch has one value a channel; raises UserError."""
    try:
        yield
    except ValueError as error:
        if _ONE_VALUE not in str(error):
            raise
        raise UserError(f"batch statistics: a batch has one value a channel ({error}); give larger batches") from None


def _buffers(norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    return norm.running_mean, norm.running_var, norm.num_batches_tracked


def _mean_over_ranks(norms: Sequence[Any]) -> None:
    """The mean over the batches of every process, the same bits in each."""
    if ranks.rank_and_world()[1] == 1:
        return
    of_rank = ranks.gather([[buffer.cpu() for buffer in _buffers(norm)] for norm in norms])
    for i, norm in enumerate(norms):
        of_norm = zip(*(buffers[i] for buffers in of_rank), strict=True)
        means, variances, counts = (torch.stack(buffers).double() for buffers in of_norm)
        share = (counts / counts.sum().clamp(min=1))[:, None]  # each process's share of all batches
        norm.running_mean.copy_((means * share).sum(0))
        norm.running_var.copy_((variances * share).sum(0))
        norm.num_batches_tracked.copy_(counts.sum())


def _check(norms: Mapping[str, Any]) -> None:
    if norms and not any(norm.num_batches_tracked for norm in norms.values()):
        raise UserError(f"{next(iter(norms))}: no input reached its batch statistics; give batches of inputs")
    for name, norm in norms.items():
        if not all(bool(buffer.isfinite().all()) for buffer in _buffers(norm)):
            raise UserError(f"{name}: its batch statistics are not finite; give inputs without NaN or infinity")
