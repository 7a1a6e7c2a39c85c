"""Report a run that ends before all stages of its plan, since the weights of the missing stages are still dense.

    --max-epoch, --max-update, --stop-min-lr    an error: the options contradict the plan
    --stop-time-hours                           a warning: the run goes on with more hours
    --patience                                  ends a run in its last stage alone (`best_so_far.py`)

Where the options alone tell it, the error comes before the training (`stage_times.py`).
"""

import functools
import logging
from typing import Any

from ...errors import UserError
from ..exits import exits_on_user_error
from .best_so_far import fairseq_train

logger = logging.getLogger(__name__)


def has_stages(trainer: Any) -> bool:
    """Say whether a plan with stages drives this Trainer."""
    return bool(getattr(getattr(trainer.quantizer, "plan", None), "stages", ()))


def watch_end(trainer: Any) -> None:
    """Make fairseq-train tell how a training with stages ended, and this Trainer when its learning rate ends it."""
    program = fairseq_train()
    if program is not None and not hasattr(program.train, "quant_noise_stages"):
        program.train = _watched(program.train)
    step = trainer.lr_step

    def lr_step(epoch: int, val_loss: float | None = None) -> Any:
        rate, lowest = step(epoch, val_loss), trainer.cfg.optimization.stop_min_lr
        if rate <= lowest and not trainer.quantizer.loading:
            _refuse(trainer, f"--stop-min-lr {lowest}: a learning rate of {rate} ends the run", "give less")
        return rate

    trainer.lr_step = lr_step


def _watched(train: Any) -> Any:
    """Wrap fairseq-train's function for an epoch, to check the stages when the run ends with that epoch."""

    @functools.wraps(train)
    def epoch(cfg: Any, trainer: Any, task: Any, epoch_itr: Any) -> Any:
        losses, stopped = train(cfg, trainer, task, epoch_itr)
        if has_stages(trainer):
            _check_end(cfg.optimization, trainer, epoch_itr, stopped)
        return losses, stopped

    epoch.quant_noise_stages = True  # type: ignore[attr-defined]
    return epoch


def _check_end(options: Any, trainer: Any, epoch_itr: Any, stopped: bool) -> None:
    last_update, last_epoch = options.max_update, options.max_epoch
    if stopped and 0 < last_update <= trainer.get_num_updates():
        _refuse(trainer, f"--max-update {last_update}: the run ended", "give more")
    elif not stopped and 0 < last_epoch < epoch_itr.next_epoch_idx:
        _refuse(trainer, f"--max-epoch {last_epoch}: the run ended", "give more")
    elif stopped and trainer.quantizer.to_come:
        logger.warning(
            f"--stop-time-hours {options.stop_time_hours}: the run ended before {trainer.quantizer.next_stage}, whose "
            "weights are dense still; with more hours the same command goes on from the last checkpoint"
        )


def _refuse(trainer: Any, reason: str, cure: str) -> None:
    """End the process where stages are to come."""
    with exits_on_user_error():
        if trainer.quantizer.to_come:
            raise UserError(
                f"{reason} before {trainer.quantizer.next_stage}, whose weights are dense still; {cure}, and the same "
                "command goes on from the last checkpoint"
            )
