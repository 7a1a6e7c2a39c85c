"""Watch over the trainings that fairseq-hydra-train starts, as the callback that configs/base.yaml names.

Hydra hands on a key that nobody gave as the text `???`. A sweep's trainings share one save_dir. And on SLURM, Hydra's
launcher keeps the exception of a training that fails, so that SLURM takes the job for a complete one; it does not say
the job's number, nor that a job can never start.

To import this registers the resolver `quant_noise` for values that a configuration cannot know:

    ${quant_noise:user_dir}    the folder of this package, for common.user_dir
    ${quant_noise:port}        a port for the processes of one job, from the number of the SLURM job
    ${quant_noise:required}    none: the command must give it. Hydra's own `???` does not replace an earlier default
"""

import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from ..errors import UserError
from .exits import exits_on_user_error
from .submission import follow, leave_error

FIRST_PORT, PORTS = 10000, 20000  # below the ports that Linux gives to outgoing connections, from 32768
_MISSING = ("???", "${quant_noise:required}")  # how a configuration says that a value must be given
_HINTS = {
    "task.data": "the folder with the data",
    "checkpoint.finetune_from_model": "the checkpoint to start from; null starts from random weights",
}


def user_dir() -> str:
    """The folder that fairseq is to import, of the package that is running."""
    return str(Path(__file__).resolve().parents[1])


def port() -> int:
    """A port that two jobs on one node do not have in common, the same in all processes of a job."""
    return FIRST_PORT + int(os.environ.get("SLURM_JOB_ID", 0)) % PORTS


def required() -> str:
    """Refuse to make up a value. Raises UserError."""
    raise UserError("a value must be given, with KEY=VALUE; --cfg job shows which: those with quant_noise:required")


_VALUES = {"user_dir": user_dir, "port": port, "required": required}
OmegaConf.register_new_resolver("quant_noise", lambda what: _VALUES[what](), replace=True)


class Jobs(Callback):
    """Check what is given, give each training of a sweep a folder, and let SLURM see how a training ends."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse a training that lacks a value. Raises SystemExit."""
        with exits_on_user_error(always=True):
            check_given(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse a sweep that lacks a value, and prepare it. Raises SystemExit."""
        swept = swept_keys(config)
        with exits_on_user_error(always=True):
            check_given(config, swept)
        if swept:
            separate_folders(config, swept)
        if _on_slurm(config):
            follow(Path(config.hydra.launcher.submitit_folder).parent)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """End the SLURM task of a training that failed with the error in its log and exit code 1. Raises SystemExit."""
        if job_return.status is not JobStatus.FAILED or not _on_slurm(config):
            return
        try:
            _ = job_return.return_value
        except Exception as error:
            told = "".join(traceback.format_exception(error))
            print(told, file=sys.stderr, flush=True)  # Hydra's log may be another file
            leave_error(told)
            raise SystemExit(1) from None


def check_given(config: DictConfig, later: tuple[str, ...] = ()) -> None:
    """Check that a configuration has every value that must be given.

    Args:
        config: as Hydra composed it, with its own section.
        later: keys whose values a sweep gives.

    Raises:
        UserError: a value is missing.
    """
    plain = OmegaConf.to_container(config, resolve=False)
    sections = {name: value for name, value in plain.items() if name != "hydra"} if isinstance(plain, dict) else {}
    for key in _missing(sections):
        if key not in later:
            hint = f" ({_HINTS[key]})" if key in _HINTS else ""
            raise UserError(f"{key} is not given; add {key}=VALUE to the command{hint}")


def _missing(node: Any, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _missing(value, f"{prefix}{name}.")
        elif isinstance(value, str) and value in _MISSING:
            yield f"{prefix}{name}"


def swept_keys(config: DictConfig) -> tuple[str, ...]:
    """The keys and groups for which the command gives several values, as `common.seed=1,2`."""
    overrides = OverridesParser.create().parse_overrides([*config.hydra.overrides.task])
    return tuple(override.key_or_group for override in overrides if override.is_sweep_override())


def separate_folders(config: DictConfig, swept: tuple[str, ...]) -> None:
    """Give each training of a sweep a folder of its own in `checkpoint.save_dir`, named by what is swept.

    Hydra composes each training from the overrides of the command, so it is one more of them. A save_dir that itself
    is swept or names another value stays.

    Args:
        config: of the sweep; changed.
        swept: keys and groups with several values.
    """
    folder = str(OmegaConf.to_container(config.checkpoint, resolve=False)["save_dir"])  # type: ignore[index,call-overload]
    if "checkpoint.save_dir" in swept or "${" in folder:
        return
    groups = config.hydra.runtime.choices
    values = {key: f"hydra:runtime.choices.{key}" if key in groups else key for key in swept}
    name = ",".join(f"{key.replace('/', '.')}=${{{value}}}" for key, value in values.items())
    quoted = f"{folder}/{name}".replace("'", r"\'")
    config.hydra.overrides.task.append(f"checkpoint.save_dir='{quoted}'")


def _on_slurm(config: DictConfig) -> bool:
    return str(config.hydra.launcher.get("_target_")).endswith("SlurmLauncher")
