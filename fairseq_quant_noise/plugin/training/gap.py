"""Log the quantization gap, to see whether the noise helps (fairseq issue 5223).

    quantized_loss, quantization_gap    at validation, on the first --quant-noise-gap-batches batches: the loss of the
                                        network with its weights quantized now, without fine-tuning, and how far it is
                                        above the dense one; in bits

Weights are quantized as the plan's stages that are still to come would do it. Without stages it is as the verb
`quantize` would do it by the plan that the noise prepares for: pq with the noise's d and K where it is proxy, mean or
pq, with int8 centroids where int8 is composed with it, else intN; weighted by Adam's second moments where it has some.
Inputs are not rounded, and batch normalisation keeps the dense network's statistics, which a stage estimates anew.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fairseq.logging import metrics
from torch import Tensor, nn

from ...noise import noise_of
from ...plan.plan import Plan
from ...quantization.importance import sound
from ...quantization.quantize import quantized_values, swapped
from ...quantization.targets import Target, resolve_stages
from ...utils.progress import now_and_then
from ..metrics import logger
from .endings import has_stages
from .optimizer import adam_moments


class Gap:
    """Measure the gap between the dense and the quantized network over the first batches of one validation.

    The ranks share the k-means, so that each of them makes its Gap as the validation begins.
    """

    def __init__(self, trainer: Any, batches: int) -> None:
        self.trainer, self.left = trainer, batches
        self.values: list[tuple[nn.Parameter, Tensor]] = []
        self.dense = self.quantized = self.size = 0.0
        targets = targets_of(trainer) if batches > 0 else []
        if targets:
            seed, progress = trainer.cfg.common.seed, now_and_then(logger.info)
            importance = _importance(trainer, targets)
            self.values = quantized_values(targets, seed=seed, importance=importance, progress=progress)

    @torch.no_grad()
    def step(self, sample: Any) -> None:
        """Measure one batch, after the Trainer has validated on it, and log the gap so far."""
        if self.left <= 0 or not self.values:
            return
        self.left -= 1
        sample, is_dummy = self.trainer._prepare_sample(sample)
        if is_dummy:
            return
        dense, size = self._loss(sample)
        with swapped(self.values):
            quantized, _ = self._loss(sample)
        if self.left == 0:
            self.values = []
        self.dense, self.quantized, self.size = self.dense + dense, self.quantized + quantized, self.size + size
        bits = 1 / (max(self.size, 1) * math.log(2))
        metrics.log_scalar("quantized_loss", self.quantized * bits, weight=0, priority=1610, round=3)
        metrics.log_scalar("quantization_gap", (self.quantized - self.dense) * bits, weight=0, priority=1611, round=3)

    def _loss(self, sample: Any) -> tuple[float, float]:
        trainer = self.trainer
        loss, size, _ = trainer.task.valid_step(sample, trainer.get_model(), trainer.get_criterion())
        return float(loss), float(size)


def targets_of(trainer: Any) -> list[Target]:
    """Find the weights that are still dense, in the remaining stages or else in the plan that the noise implies."""
    stages = trainer.quantizer.targets if has_stages(trainer) else []
    targets = stages or resolve_stages(noise_plan(trainer.get_model()), trainer.get_model())
    return [target for target in targets if not isinstance(target.weight.stored, nn.Module)]


def noise_plan(model: nn.Module) -> Plan:
    """Make the plan that the noise prepares for, one stage a weight; of several rules the last one counts."""
    draw = noise_of(model)
    rules = {name: noise.rules[-1].rule for name, noise in draw.weights.items()} if draw is not None else {}
    stages: list[dict[str, Any]] = []
    centroids = "fp16"
    for name, rule in rules.items():
        match = {"match": re.escape(name)}
        if {"proxy", "mean", "pq"} & set(rule.kinds):
            stages.append({**match, "block_size": rule.d, "n_centroids": rule.n_centroids})
            centroids = "int8" if "int8" in rule.kinds else centroids
        else:
            stages.append({**match, "scheme": rule.kinds[-1], "range": rule.range})
    return Plan.of({"stages": stages, "centroids": {"dtype": centroids}})


def _importance(trainer: Any, targets: Sequence[Target]) -> Mapping[str, Tensor]:
    """Find what k-means weighs errors by: the stages' values, or else those that a checkpoint saved now would hold."""
    if has_stages(trainer):
        kept: Mapping[str, Tensor] = trainer.quantizer.importance
        return kept
    dense = {t.weight.tensor_name: t.weight.parameter for t in targets if isinstance(t.weight.parameter, Tensor)}
    moments = sound(adam_moments(trainer.get_model(), trainer.optimizer), dense)
    return {name: tensor.bfloat16() for name, tensor in moments.items()}
