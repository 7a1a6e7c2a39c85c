"""Compute the distillation loss from the uncompressed teacher, as iterative PQ (arXiv 1907.05686, section 3.4).

    KL(teacher || student)            summed over the predictions of a batch that are distributions
    || student - teacher ||^2         summed over those that are numbers (regression): one logit is no distribution

Legend: N predictions of a batch, V classes or words, C channels.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Recorder:
    """A model that remembers its last call, handed to a criterion in the model's place."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._log_probs: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, and keep the arguments and the output."""
        self.call = (args, kwargs)
        self.output = self._model(*args, **kwargs)
        self._log_probs = None
        return self.output

    def get_normalized_probs(self, net_output: Any, log_probs: bool, *sample: Any) -> Tensor:
        """The model's own probabilities; those that the criterion and the distillation both want are computed once.

        Over a large vocabulary they are a good part of an update.
        """
        model: Any = self._model
        if not log_probs or net_output is not self.output:
            return model.get_normalized_probs(net_output, log_probs, *sample)
        if self._log_probs is None:
            self._log_probs = model.get_normalized_probs(net_output, log_probs, *sample)
        return self._log_probs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def kl_sum(student: Tensor, teacher: Tensor, keep: Tensor | None = None) -> Tensor:
    """sum over rows of KL(teacher || student).

    Args:
        student: (N, V) log-probabilities.
        teacher: (N, V), the teacher's, without a gradient.
        keep: (N,) bool, the rows that count; all of them by default.

    Returns:
        The sum in nats, of shape ().
    """
    log_q, log_p = student.float(), teacher.float()
    p = log_p.exp()  # (N, V)
    if keep is not None:
        p *= keep.unsqueeze(-1)
    return (p * log_p).sum() - (p * log_q).sum()


def log_softmax(logits: Tensor) -> Tensor:
    """Over the last dimension, in fp32."""
    return F.log_softmax(logits, dim=-1, dtype=torch.float32)


def distillation_loss(
    student: Recorder, teacher: nn.Module, sample: Mapping[str, Any], padding_idx: int, regression: bool = False
) -> Tensor:
    """The loss of the student's last call against the teacher on the same input; padding does not count.

    With an adaptive softmax the head and each tail cluster are distilled on the predictions that reach them, so that
    the whole vocabulary is never computed.

    Args:
        student: its last output begins with (..., V) scores, or (..., C) features for an adaptive softmax; the leading
            dimensions make N predictions.
        teacher: a model with outputs of the same form.
        sample: fairseq's batch, with the targets: one word or class each, or for a regression none is needed.
        padding_idx: the target that is padding.
        regression: the first output of both models is numbers, of equal shape, and no distribution.

    Returns:
        The sum over the predictions, of shape ().
    """
    args, kwargs = student.call
    with torch.no_grad():
        taught = teacher(*args, **kwargs)
    if regression:
        return F.mse_loss(student.output[0].float(), taught[0].float(), reduction="sum")
    target = student.get_targets(sample, student.output)
    adaptive = getattr(getattr(student, "decoder", None), "adaptive_softmax", None)
    if adaptive is None:
        mine = student.get_normalized_probs(student.output, log_probs=True)
        theirs = teacher.get_normalized_probs(taught, log_probs=True)  # type: ignore[operator]
        by_word = mine.dim() == 3 and target.numel() == mine[..., 0].numel()  # not one class for each row
        keep = target.flatten() != padding_idx if by_word else None
        return kl_sum(mine.flatten(0, -2), theirs.flatten(0, -2), keep)
    flat = target.view(-1)
    clusters, targets = adaptive(student.output[0], flat)
    with torch.no_grad():
        taught_clusters, _ = teacher.decoder.adaptive_softmax(taught[0], flat)  # type: ignore[union-attr,operator]
    total = clusters[0].new_zeros(())
    for mine, theirs, cluster_target in zip(clusters, taught_clusters, targets, strict=True):
        if mine is not None:
            keep = cluster_target != padding_idx if mine is clusters[0] else None
            total = total + kl_sum(log_softmax(mine), log_softmax(theirs), keep)
    return total
