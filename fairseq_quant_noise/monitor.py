"""The noise's measurements in fairseq's log: is the noise as large as it should be, and does it help?

    distortion_KIND_weight, distortion_KIND_output    while training, every --quant-noise-log-interval updates
    quantized_loss, quantization_gap                  at validation, on the first --quant-noise-gap-batches batches:
                                                      the loss of the network with its weights quantized now, without
                                                      fine-tuning, and how far it is above the dense one; in bits

(`noise/measure.py` computes them; they answer fairseq issue 5223.)
"""

import math
from dataclasses import replace
from typing import Any

import torch
from fairseq.logging import metrics
from torch import Tensor, nn

from .noise.measure import Distortion, Probe, quantized_values, swapped, target_rules
from .plan import NoiseRule

_DISTORTION = "distortion_"


def probe_next_forward(model: nn.Module) -> None:
    """Measure the next training forward and log what comes out."""
    Probe(model, _log_distortion)


def _log_distortion(found: dict[str, Distortion]) -> None:
    for kind, distortion in found.items():
        for part, value in (("weight", distortion.of_weight), ("output", distortion.of_output)):
            if value is not None:
                metrics.log_scalar(f"{_DISTORTION}{kind}_{part}", value, weight=0, priority=1600, round=4)


def drop_unmeasured() -> None:
    """Remove from fairseq's log each distortion that was not measured since the log's last line; it would be None."""
    for meters in metrics.get_active_aggregators():
        gone = {name for name, meter in meters.items() if name.startswith(_DISTORTION) and meter.val is None}
        for name in gone:
            del meters[name]
        meters.priorities[:] = [entry for entry in meters.priorities if entry[-1] not in gone]


class Gap:
    """The gap between the dense and the quantized network over the first batches of one validation."""

    def __init__(self, trainer: Any, batches: int) -> None:
        self.trainer, self.left = trainer, batches
        self.values: list[tuple[nn.Parameter, Tensor]] | None = None  # found when the first batch comes
        self.dense = self.quantized = self.size = 0.0

    @torch.no_grad()
    def step(self, sample: Any) -> None:
        """Measure one batch, after the Trainer has validated on it, and log the gap so far."""
        if self.left <= 0:
            return
        self.left -= 1
        sample, is_dummy = self.trainer._prepare_sample(sample)
        if is_dummy:
            return
        if self.values is None:
            self.values = quantized_values(self.trainer.get_model(), _targets(self.trainer))
        if not self.values:
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


def _targets(trainer: Any) -> dict[str, NoiseRule]:
    """For each weight that is dense still: the plan's stage where there is one, else what its noise prepares for."""
    rules = target_rules(trainer.get_model())
    for target in getattr(trainer.quantizer, "targets", ()):
        rule = NoiseRule(".*", 1.0, target.rule.scheme, range=target.rule.range)
        if target.block_size is not None:
            rule = replace(rule, block_size=target.block_size, n_centroids=target.n_centroids)
        rules[target.weight.name] = rule
    return rules
