"""Calibrate activation ranges in `fairseq-train` by evaluation-mode forwards before each validation and checkpoint.

A range that training forwards leave is a mean over weights that have gone since, under dropout and noise, and each
rank's is of its own data. What is validated, saved and exported has ranges of the weights as they are then, as the
paper finds them (arXiv 2004.07320): on `calibration_batches` batches of the training data, the same ones on every rank,
whose bits are then those of rank 0.
"""

from typing import Any

import torch

from ...layers import calibrating, input_quantizers
from ...utils.ranks import gather
from ..batches import first_batches


def begin_epoch(trainer: Any, epoch: int) -> None:
    """Remember the epoch, from whose data the batches come."""
    trainer.quant_noise_epoch = epoch


def calibrate(trainer: Any) -> None:
    """Find the ranges of the Trainer's model, once after an update; every rank must call it.

    Nothing happens to a model without quantized inputs. A quantizer that the task never uses, as that of another head,
    keeps what it has.
    """
    model, criterion = trainer.get_model(), trainer.get_criterion()
    quantizers = input_quantizers(model)
    now = trainer.get_num_updates(), list(quantizers)
    if not quantizers or trainer.__dict__.get("quant_noise_calibrated") == now:
        return
    epoch, training = trainer.__dict__.get("quant_noise_epoch", 1), criterion.training
    count = max(quantizer.batches for quantizer in quantizers.values())
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    criterion.eval()
    with torch.random.fork_rng(devices), calibrating(model, required=False):
        for sample in first_batches(trainer, epoch, count):
            criterion(model, sample)
    criterion.train(training)
    _take_from_first(quantizers)
    trainer.quant_noise_calibrated = now


def _take_from_first(quantizers: dict[str, Any]) -> None:
    """Let every rank have the bits of rank 0."""
    mine = {name: {key: t.cpu() for key, t in q.state_dict().items()} for name, q in quantizers.items()}
    for name, state in gather(mine)[0].items():
        quantizers[name].load_state_dict(state)
