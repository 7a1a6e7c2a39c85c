"""Checkpoints without running what is in them: `torch.load(weights_only=True)` and a short allow-list.

A refusal names the global and what to do; there is no unsafe fallback.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from .errors import DamagedFileError, UserError

#: What fairseq's checkpoints hold besides tensors and plain containers.
ALLOWED: list[Any] = [argparse.Namespace]


def safe_load(path: str | Path) -> dict[str, Any]:
    """The content of a fairseq checkpoint, on the CPU.

    Raises:
        UserError: no such file.
        DamagedFileError: not a whole checkpoint, or one that holds anything outside the allow-list.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"checkpoint {path}: {error.strerror}; give the path of a checkpoint") from None
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, ... for a file it cannot read
        raise DamagedFileError(_refusal(path, str(error))) from None
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"checkpoint {path}: has no 'model'; give a checkpoint that fairseq-train wrote")
    return state


def _refusal(path: str | Path, message: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", message)
    if found is None:
        return f"checkpoint {path}: not a whole PyTorch checkpoint; copy or download it again"
    return (
        f"checkpoint {path}: refused, its pickle calls for {found[1]}, which could run code; if you trust it, load it "
        "once with torch.load(path, weights_only=False), keep its 'model' and 'args' or 'cfg', and save it again"
    )
