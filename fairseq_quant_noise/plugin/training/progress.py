"""Add figures about a run to fairseq's line of progress, and so to TensorBoard and wandb.

    minutes_left            of the training, with --max-update, at the mean speed since this process began
    ipq_stage               how many stages of the plan have been quantized
    ipq_mib, ipq_ratio      the network's size now by the paper's accounting, and how often the dense size holds it

As they are after the update: a stage that begins with it is counted. Criterion `ipq` has logged the size before, for
fairseq-validate has no Trainer; any other criterion gets it here.
"""

import time
from typing import Any

from fairseq.logging import metrics

from ...accounting import MIB
from ...quantization.table import model_bytes
from ..criterions.ipq import log_size
from ..models.quantizable import Quantizable
from .endings import has_stages


def log_progress(trainer: Any, training: bool) -> None:
    """Add figures to the log of the update, or of the validation batch, that the Trainer has just done."""
    if not isinstance(trainer.get_model(), Quantizable):
        return
    left = minutes_left(trainer) if training else None
    if left is not None:
        metrics.log_scalar("minutes_left", left, weight=0, priority=1500, round=1)
    if has_stages(trainer):
        metrics.log_scalar("ipq_stage", trainer.quantizer.done, weight=0, priority=190, round=0)
        now, dense = model_bytes(trainer.get_model(), trainer.quantizer.plan.dense.bits)
        log_size(now / MIB, dense / now)


def minutes_left(trainer: Any) -> float | None:
    """Estimate the minutes until --max-update; None without it, and at the first update of a process."""
    now, n, last = time.perf_counter(), trainer.get_num_updates(), trainer.cfg.optimization.max_update
    began, first = trainer.__dict__.setdefault("quant_noise_began", (now, n))
    if n <= first or last <= 0:
        return None
    return max(last - n, 0) * (now - began) / (n - first) / 60
