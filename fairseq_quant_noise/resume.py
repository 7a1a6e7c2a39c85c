"""Where a run was in its data: the same command goes on with the batches that it would have had.

What fairseq's checkpoints leave out is kept beside its own position:

- fairseq puts the sentences of the first epoch into batches, and shuffles those batches in every epoch. A run that
  resumes in a later epoch puts them together anew, and so differently. Here they are those of the first epoch again.
- the position counts the batches of one process. On another number of processes it is counted anew, so that the epoch
  goes on where it was.
- --patience counts validations without a gain.

And a run that is complete gets no update more: fairseq does one before it looks, so that a command that is given again
after the last checkpoint, by a scheduler say, would end elsewhere.
"""

import logging
import sys
from typing import Any

import fairseq.trainer

logger = logging.getLogger(__name__)

_BEFORE_ALL_EPOCHS = -1  # 0 means without end
KEY = "quant_noise_position"  # in a checkpoint's extra_state

_get_train_iterator = fairseq.trainer.Trainer.get_train_iterator


class Position:
    """What a Trainer remembers of its batches."""

    def __init__(self) -> None:
        self.batches_of: int | None = None  # the epoch in which the batches were made
        self.made = False


def position_of(trainer: Any) -> Position:
    """The Trainer's, made when first asked for."""
    position: Position = trainer.__dict__.setdefault("quant_noise_position", Position())
    return position


def state(trainer: Any) -> dict[str, Any]:
    """What a checkpoint keeps."""
    return {
        "batches_of": position_of(trainer).batches_of,
        "world_size": trainer.data_parallel_world_size,
        "patience": vars(_should_stop_early()).copy(),
    }


def load(trainer: Any, extra_state: dict[str, Any]) -> None:
    """Take back what `state` gave; the position in `extra_state` becomes one of this number of processes."""
    kept, iterator = extra_state.get(KEY), extra_state["train_iterator"]
    if kept is None:
        return
    position_of(trainer).batches_of = kept["batches_of"]
    vars(_should_stop_early()).update(kept["patience"])
    now = trainer.data_parallel_world_size
    if now != kept["world_size"]:
        every = trainer.cfg.optimization.update_freq
        together = every[min(iterator["epoch"], len(every)) - 1]
        iterator["iterations_in_epoch"] = recount(iterator["iterations_in_epoch"], kept["world_size"], now, together)


def end_if_complete(trainer: Any) -> None:
    """Leave nothing to train where --max-update or --patience had ended the run of a checkpoint."""
    most, patience = trainer.cfg.optimization.max_update, trainer.cfg.checkpoint.patience
    waited = getattr(_should_stop_early(), "num_runs", 0)
    if 0 < most <= trainer.get_num_updates() or 0 < patience <= waited:
        logger.info(
            f"the run is complete, {trainer.get_num_updates()} updates; to go on, raise --max-update or --patience"
        )
        trainer.cfg.optimization.max_epoch = _BEFORE_ALL_EPOCHS


def recount(done: int, before: int, now: int, together: int) -> int:
    """The batches that each of `now` processes has behind it, when each of `before` had `done`.

    A multiple of `together`, the batches of one update: the few of an update that is cut are seen twice.
    """
    return done * before // now // together * together


def get_train_iterator(trainer: Any, epoch: int, *args: Any, **kwargs: Any) -> Any:
    """Trainer.get_train_iterator, which makes the batches of the epoch in which the run began."""
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
    """Whether fairseq makes new batches in each epoch."""
    return bool(
        trainer.cfg.dataset.update_epoch_batch_itr
        or kwargs.get("disable_iterator_cache")
        or getattr(trainer.task.cfg, "rebuild_batches", False)
    )


def _should_stop_early() -> Any:
    """fairseq-train's function, which keeps its counts in its own attributes; an empty one outside of fairseq-train."""
    program = sys.modules.get("fairseq_cli.train")
    return program.should_stop_early if program is not None else lambda: None


def install() -> None:
    """Put this method in the Trainer's place."""
    fairseq.trainer.Trainer.get_train_iterator = get_train_iterator
