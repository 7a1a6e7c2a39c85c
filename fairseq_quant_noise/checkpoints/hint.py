"""Say how a Hugging Face folder becomes a checkpoint, to a user who gives the folder in the place of one."""

import shlex
from pathlib import Path

CONFIG = "config.json"


def is_hugging_face(folder: str | Path) -> bool:
    """Whether `folder` is one of Hugging Face's kind, by its config.json."""
    return (Path(folder) / CONFIG).is_file()


def of_folder(folder: str | Path) -> str:
    """What is wrong with a folder in the place of a checkpoint, and the cure."""
    if not is_hugging_face(folder):
        return "is a folder; give the path of a checkpoint"
    return f"is a Hugging Face folder; make a checkpoint of it first: {command(folder)}"


def command(folder: str | Path) -> str:
    """The command that converts `folder`."""
    out = f"{Path(folder).resolve().name}-fairseq/model.pt"
    return f"fairseq-quant-noise from-hf {shlex.quote(str(folder))} --out {shlex.quote(out)}"
