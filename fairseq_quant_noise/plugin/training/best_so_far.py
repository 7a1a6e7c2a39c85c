"""Reset the best validation score at each stage: a stage raises the loss, which must not stop or anneal the run.

fairseq compares each validation with the best one for --patience, for checkpoint_best.pt and --keep-best-checkpoints,
and in reduce_lr_on_plateau. Across a stage these comparisons are between two networks of different size. So each
stage has its own best, and --patience ends a run in its last stage alone: the plan says how long the others are.
"""

import re
import sys
from pathlib import Path
from typing import Any

import fairseq.checkpoint_utils
from fairseq.file_io import PathManager
from torch.optim.lr_scheduler import ReduceLROnPlateau

_PROGRAMS = ("__main__", "fairseq_cli.train")  # fairseq-train, when it is run by `python -m` and else
_BEST = re.compile(r"checkpoint_best.*\.pt|checkpoint\.best_.*\.pt")
_EARLIER = "_before_stage_"  # in the name of an earlier stage's best checkpoint


def fairseq_train() -> Any:
    """Find the module of fairseq-train where this process runs it; else None."""
    modules = (sys.modules.get(name) for name in _PROGRAMS)
    return next((module for module in modules if hasattr(module, "should_stop_early")), None)


def patience() -> dict[str, Any]:
    """Return the counters of --patience, which fairseq-train keeps in attributes of a function."""
    program = fairseq_train()
    return vars(program.should_stop_early) if program is not None else {}


def plateau(trainer: Any) -> ReduceLROnPlateau | None:
    """Return torch's scheduler inside --lr-scheduler reduce_lr_on_plateau; None with any other."""
    scheduler = getattr(trainer.lr_scheduler, "inner", trainer.lr_scheduler)
    found = getattr(scheduler, "lr_scheduler", None)
    return found if isinstance(found, ReduceLROnPlateau) else None


def forget_patience() -> None:
    """Let --patience count from here."""
    for name in ("best", "num_runs"):
        patience().pop(name, None)


def start_anew(trainer: Any, stage: int) -> None:
    """Forget the best score of the stages before `stage` (from 1), and rename its checkpoints to keep them."""
    forget_patience()
    vars(fairseq.checkpoint_utils.save_checkpoint).pop("best", None)
    scheduler = plateau(trainer)
    if scheduler is not None:
        scheduler.best, scheduler.num_bad_epochs, scheduler.cooldown_counter = scheduler.mode_worse, 0, 0
    if trainer.should_save_checkpoint_on_current_rank and not trainer.cfg.checkpoint.no_save:
        _put_aside(trainer.cfg.checkpoint.save_dir, stage)


def _put_aside(folder: str, stage: int) -> None:
    if not PathManager.supports_rename(folder):
        return
    for path in sorted(Path(folder).glob("*.pt")):
        if _BEST.fullmatch(path.name) and _EARLIER not in path.name:
            path.replace(path.with_name(f"{path.stem}{_EARLIER}{stage}.pt"))
