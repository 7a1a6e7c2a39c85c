"""Resume a run at its place in the data: the same command goes on with the batches that it would have had.

What fairseq's checkpoints leave out is kept beside its own position:

- fairseq puts the sentences of the first epoch into batches, and shuffles those batches in every epoch. A run that
  resumes in a later epoch puts them together anew, and so differently. Here they are those of the first epoch again.
- the position counts the batches of one process. On another number of processes it is counted anew, so that the epoch
  goes on where it was.
- --patience counts validations without a gain, and so does reduce_lr_on_plateau. Its scheduler is told the loss of an
  epoch after the checkpoint at that epoch's end is written: a run that resumes there tells it again.

A checkpoint that is asked for and is not there is an error: fairseq goes on with random weights. The one exception is a
training without stages whose --restore-file is in its own --save-dir, as a script has it that may be started again.

And a run that is complete gets no update more: fairseq does one before it looks, so that a command that is given again
after the last checkpoint, by a scheduler say, would end elsewhere.
"""

import logging
from pathlib import Path
from typing import Any

import fairseq.trainer
from fairseq.file_io import PathManager

from ...checkpoints.keys import POSITION
from ...errors import UserError
from .best_so_far import patience, plateau

logger = logging.getLogger(__name__)

_BEFORE_ALL_EPOCHS = -1  # 0 means without end
_COUNTS = ("num_bad_epochs", "cooldown_counter")  # state of torch's ReduceLROnPlateau that fairseq leaves out

_get_train_iterator = fairseq.trainer.Trainer.get_train_iterator


class Position:
    """Hold what a Trainer remembers of its batches."""

    def __init__(self) -> None:
        self.batches_of: int | None = None  # the epoch in which the batches were made
        self.made = False


def position_of(trainer: Any) -> Position:
    """Return the Trainer's Position, made at the first call."""
    position: Position = trainer.__dict__.setdefault("quant_noise_position", Position())
    return position


def state(trainer: Any) -> dict[str, Any]:
    """Return the state that a checkpoint keeps."""
    return {
        "batches_of": position_of(trainer).batches_of,
        "world_size": trainer.data_parallel_world_size,
        "patience": patience().copy(),
        "plateau": {name: getattr(plateau(trainer), name) for name in _COUNTS} if plateau(trainer) else {},
    }


def load(trainer: Any, extra_state: dict[str, Any]) -> None:
    """Take back what `state` gave; the position in `extra_state` becomes one of this number of processes."""
    kept, iterator = extra_state.get(POSITION), extra_state["train_iterator"]
    if kept is None:
        return
    position_of(trainer).batches_of = kept["batches_of"]
    patience().update(kept["patience"])
    now = trainer.data_parallel_world_size
    if now != kept["world_size"]:
        every = trainer.cfg.optimization.update_freq
        together = every[min(iterator["epoch"], len(every)) - 1]
        iterator["iterations_in_epoch"] = recount(iterator["iterations_in_epoch"], kept["world_size"], now, together)


def load_schedule(trainer: Any, extra_state: dict[str, Any]) -> None:
    """Take back what `state` gave of the learning-rate schedule, and the loss of the epoch that has just ended."""
    scheduler, iterator = plateau(trainer), extra_state["train_iterator"]
    if scheduler is not None:
        vars(scheduler).update(extra_state.get(POSITION, {}).get("plateau", {}))
    if iterator["iterations_in_epoch"] == 0 and iterator["epoch"] > 1:
        trainer.lr_step(iterator["epoch"] - 1, extra_state.get("val_loss"))


def is_own(trainer: Any, filename: str) -> bool:
    """Say whether a checkpoint belongs to this run: it is in the folder that the run saves to."""
    return Path(filename).parent.resolve() == Path(trainer.cfg.checkpoint.save_dir).resolve()


def check_given(trainer: Any, filename: str, stages: bool) -> None:
    """Check that the checkpoint that an option names exists.

    Args:
        trainer: fairseq's.
        filename: the checkpoint that fairseq is about to load.
        stages: whether a plan is to quantize the network.

    Raises:
        UserError: it does not exist.
    """
    options, last = trainer.cfg.checkpoint, f"checkpoint_last{trainer.checkpoint_suffix}.pt"
    given = "--restore-file" if options.restore_file != "checkpoint_last.pt" else "--continue-once"
    asked_for = given == "--restore-file" or filename != str(Path(options.save_dir) / last)
    if not asked_for or PathManager.isfile(filename) or (is_own(trainer, filename) and not stages):
        return
    without = "its stages would quantize random weights" if stages else "without the option training starts anew"
    raise UserError(f"{given} {filename}: no such file; give the path of a checkpoint ({without})")


def end_if_complete(trainer: Any, filename: str) -> None:
    """Leave nothing to train where --max-update or --patience had ended the run of its own checkpoint."""
    if not is_own(trainer, filename):
        return
    most, allowed = trainer.cfg.optimization.max_update, trainer.cfg.checkpoint.patience
    if 0 < most <= trainer.get_num_updates() or 0 < allowed <= patience().get("num_runs", 0):
        logger.info(
            f"the run is complete, {trainer.get_num_updates()} updates; to go on, raise --max-update or --patience"
        )
        trainer.cfg.optimization.max_epoch = _BEFORE_ALL_EPOCHS


def recount(done: int, before: int, now: int, together: int) -> int:
    """Convert a per-process count of batches from `before` to `now` processes.

    A multiple of `together`, the batches of one update: the few of an update that is cut are seen twice.
    """
    return done * before // now // together * together


def get_train_iterator(trainer: Any, epoch: int, *args: Any, **kwargs: Any) -> Any:
    """Run Trainer.get_train_iterator so that it makes the batches of the epoch in which the run began."""
    position = position_of(trainer)
    first = epoch if position.batches_of is None else position.batches_of
    remade = _are_remade(trainer, kwargs)
    if remade or position.made or first == epoch:
        position.batches_of, position.made = first, True
        return _get_train_iterator(trainer, epoch, *args, **kwargs)
    position.made = True
    batches = _get_train_iterator(trainer, first, *args, **kwargs)
    if trainer.task.dataset_to_epoch_iter.get(getattr(batches, "dataset", None)) is not batches:  # a task of its own
        return _get_train_iterator(trainer, epoch, *args, **kwargs)
    batches.dataset.set_epoch(epoch)  # its data loader may start at once
    return batches


def _are_remade(trainer: Any, kwargs: dict[str, Any]) -> bool:
    """Say whether fairseq makes new batches in each epoch."""
    return bool(
        trainer.cfg.dataset.update_epoch_batch_itr
        or kwargs.get("disable_iterator_cache")
        or getattr(trainer.task.cfg, "rebuild_batches", False)
    )
