"""Say what became of jobs that Hydra's launcher submitted to SLURM through submitit, which says nothing itself."""

import functools
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError

R = TypeVar("R")
logger = logging.getLogger(__name__)

_SOON, _AT_MOST = 2.0, 60.0  # seconds between two looks, at first and later
#: Reasons for which SLURM lets a job wait that no other job's end will change; also all that end in _PER_JOB.
_NEVER = {
    *("BadConstraints", "PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit", "InvalidAccount", "InvalidQOS"),
    *("AccountNotAllowed", "QOSNotAllowed", "JobHeldUser", "JobHeldAdmin"),
}
_PER_JOB = ("PerJob", "PerJobLimit")


class Submissions:
    """Watch submitit's folder for jobs that are submitted from now on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen = set(_jobs(folder))
        self.waiting: set[str] = set()

    def look(self) -> bool:
        """Log the numbers of new jobs, and each reason that no time will change; say whether there were new ones."""
        new = [job for job in _jobs(self.folder) if job not in self.seen]
        for job in new:
            logger.info(f"submitted as job {job}; its logs are in {self.folder / job}")
        self.seen.update(new)
        self.waiting.update(new)
        for job in sorted(self.waiting):
            state, reason = _state(job)
            never = reason in _NEVER or reason.endswith(_PER_JOB)
            if state == "PENDING" and never:
                logger.warning(
                    f"job {job} can never start as it is: SLURM says {reason}; cancel it (scancel {job}) and ask for "
                    "less in hydra.launcher, or for another partition"
                )
            if state != "PENDING" or never:
                self.waiting.discard(job)
        return bool(new)


def follow(folder: Path) -> None:
    """Log, from a thread of its own, the number of each job that is submitted, and the reason if it can never start.

    Args:
        folder: submitit's, without the `%j` for the number.
    """
    submissions = Submissions(folder)

    def watch() -> None:
        pause = _SOON
        while True:
            time.sleep(pause)
            pause = _SOON if submissions.look() or not submissions.waiting else min(1.5 * pause, _AT_MOST)

    threading.Thread(target=watch, daemon=True).start()


def _jobs(parent: Path) -> list[str]:
    """The numbers of the jobs that have a folder."""
    return sorted(path.name for path in parent.glob("*") if path.name.isdecimal())


def _state(job: str) -> tuple[str, str]:
    """What squeue says of a job: its state, and the reason why it waits; empty when it is not in the queue."""
    done = subprocess.run(["squeue", "--noheader", "--jobs", job, "--format=%T %r"], capture_output=True, text=True)
    state, _, reason = (done.stdout.splitlines() or [""])[0].strip().partition(" ")
    return state, reason


def leaves_error(function: Callable[..., R]) -> Callable[..., R]:
    """Wrap a program's start so that a user's mistake in a job reaches the command that waits for the job."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> R:
        try:
            return function(*args, **kwargs)
        except SystemExit as end:
            if isinstance(end.__cause__, UserError) and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
                leave_error(f"error: {end.__cause__}")
            raise

    return run


def leave_error(text: str) -> None:
    """In a task of a job, leave its error for the command that waits for the job, in the way of submitit.

    Without this, submitit asks SLURM's accounting, every ten minutes. From now on the task ignores SIGTERM, so that it
    ends with its own exit code, which becomes the job's, also when another task has failed first and SLURM ends this
    one. submitit's handler does so too, until the interpreter takes it off, seconds before the process ends.
    """
    from submitit import JobEnvironment
    from submitit.core.utils import cloudpickle_dump, temporary_save_path

    with temporary_save_path(JobEnvironment().paths.result_pickle) as path:
        cloudpickle_dump(("error", text), path)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
