"""What several verbs do: say how far they are, check what they are given, weigh errors."""

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..artifact.reader import SUFFIX
from ..checkpoints.checkpoint import Checkpoint
from ..errors import UserError


def say(line: str) -> None:
    """Print a line of progress, or a note, to standard error."""
    print(line, file=sys.stderr, flush=True)


def need_fairseq(option: str, instead: str) -> None:
    """Raise UserError where fairseq, which the option works with, is not installed."""
    if importlib.util.find_spec("fairseq") is None:
        raise UserError(f"{option}: needs fairseq, which is not installed; install fairseq-fixed, or {instead}")


def check_out(out: str, *read: str, packed: bool = False, makes_folder: bool = False) -> None:
    """Before any work: that `out` can be written, is no checkpoint's name, and is none of the files that are read."""
    path = Path(out)
    folder = path.absolute().parent
    if not out or path.is_dir():
        raise UserError(f"--out {out or repr(out)}: is a folder; give the name of a file in it")
    if makes_folder and not folder.exists():
        return  # it is made when there is something to put in
    if not folder.is_dir():
        raise UserError(f"--out {out}: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out {out}: the folder {folder} cannot be written; choose another place")
    if path.exists() and any(path.samefile(name) for name in read if Path(name).exists()):
        raise UserError(f"--out {out}: is a file that is read, and would be lost; choose another name")
    if packed and path.suffix == ".pt":
        cure = f"call it {path.with_suffix(SUFFIX)}"
        raise UserError(f"--out {out}: packed files must end in .safetensors; {cure}")


def importance_of(args: argparse.Namespace, checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """What k-means weighs errors by: the checkpoint's second moments, or gradients on the data, or nothing."""
    if checkpoint.moments:
        return checkpoint.moments
    note = f"note: {args.path} holds no second moments of Adam"
    if args.calibration_data is None:
        say(f"{note}, so all errors count alike in k-means; --calibration-data DATA measures gradients instead")
        return {}
    from ..plugin.calibration import gradients_on

    say(f"{note}: gradients on {args.calibration_data} stand for them")
    return gradients_on(checkpoint, args.calibration_data, say)
