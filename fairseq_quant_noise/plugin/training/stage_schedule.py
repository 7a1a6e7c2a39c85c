"""Restart the learning-rate schedule in each stage: a plan's `tuning: {schedule: restart}`.

A stage then has the rates of a run of its own. fairseq's scheduler is built anew as a stage begins, with the stage's
length for --max-update, and counts updates and epochs from there; the Trainer's own count goes on.
"""

import copy
from typing import Any

from fairseq.optim import lr_scheduler

from ...checkpoints.keys import STAGE_BEGAN


class StageSchedule(lr_scheduler.FairseqLRScheduler):
    """Replace fairseq's scheduler in the Trainer; before the first stage it behaves as that scheduler.

    Args:
        cfg: of the whole run.
        scheduler: the one that fairseq has built for the run.
    """

    def __init__(self, cfg: Any, scheduler: Any) -> None:
        super().__init__(cfg.lr_scheduler, scheduler.optimizer)
        self.run = cfg
        self.inner = scheduler
        self.update, self.epoch = 0, 1  # at which the stage began
        self.length: int | None = None  # the stage's length in updates

    def begin(self, update: int, epoch: int, length: int | None) -> None:
        """Start anew, as fairseq starts a run.

        Args:
            update: how many updates the Trainer has done.
            epoch: the one in progress, from 1.
            length: of the stage in updates; None where nothing says it.
        """
        self.update, self.epoch, self.length = update, epoch, length
        self.inner = lr_scheduler.build_lr_scheduler(_for_stage(self.run, length), self.optimizer)
        self.inner.step_begin_epoch(1)

    def step_begin_epoch(self, epoch: int) -> Any:
        """Step as fairseq does, with the epoch of the stage."""
        return self.inner.step_begin_epoch(epoch - self.epoch + 1)

    def step(self, epoch: int, val_loss: float | None = None) -> Any:
        """Step as fairseq does, with the epoch of the stage."""
        return self.inner.step(epoch - self.epoch + 1, val_loss)

    def step_update(self, num_updates: int) -> Any:
        """Step as fairseq does, with the update of the stage."""
        return self.inner.step_update(num_updates - self.update)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of fairseq's scheduler, and where the stage began."""
        return {**self.inner.state_dict(), STAGE_BEGAN: [self.update, self.epoch, self.length]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; the state of a run without restarts is fairseq's alone."""
        if STAGE_BEGAN in state_dict:
            self.begin(*state_dict[STAGE_BEGAN])
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != STAGE_BEGAN})


def _for_stage(run: Any, length: int | None) -> Any:
    """Change the scheduler's configuration: a length that equals --max-update becomes the stage's."""
    cfg, whole = copy.deepcopy(run.lr_scheduler), run.optimization.max_update
    for name in ("max_update", "total_num_update"):  # cosine and tri_stage have the first, polynomial_decay the second
        if length is not None and 0 < whole == getattr(cfg, name, None):
            setattr(cfg, name, length)
    return cfg


def restart_in_stages(trainer: Any) -> None:
    """Give this Trainer a `StageSchedule` whenever it builds its scheduler."""
    build = trainer._build_optimizer

    def build_optimizer() -> None:
        build()
        trainer._lr_scheduler = StageSchedule(trainer.cfg, trainer._lr_scheduler)

    trainer._build_optimizer = build_optimizer
