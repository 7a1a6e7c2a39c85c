"""Write each checkpoint whole or not at all, and choose the one from which a run resumes.

fairseq writes one file of a save beside its place and renames it, and then copies it in place over the others,
`checkpoint_last.pt` among them: a run that is killed at that moment cannot resume. Here all of them are written
beside, synced and renamed; and where a last checkpoint is cut nevertheless, the newest whole one takes its place.
"""

import logging
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fairseq.checkpoint_utils
import torch
from fairseq.file_io import PathManager

from ..errors import UserError, is_about_a_file
from ..utils.files import put_in_place
from .exits import exits_on_user_error

logger = logging.getLogger(__name__)

BESIDE = ".tmp"  # suffix while a file is written; always the same, so that a killed run leaves one at most
TRIES, WAIT = 3, 2.5  # seconds between them, as fairseq does: a network drive may be back by then
#: torch's words, in a RuntimeError, for a disk that is full or a folder that is not there.
_TORCH_WRITING = re.compile(r"inline_container|PytorchStreamWriter|Parent directory")
_LEGACY = b"\x80\x02"  # how a checkpoint begins that torch 1.5 or earlier wrote

_persistent_save = fairseq.checkpoint_utils.torch_persistent_save


def torch_persistent_save(obj: Any, filename: str, async_write: bool = False) -> None:
    """fairseq's function of this name; a kill or a power cut leaves the old file or the new one.

    Raises:
        SystemExit: after `error: …`, where the disk is full or cannot be written.
    """
    if async_write or not PathManager.supports_rename(filename):
        _persistent_save(obj, filename, async_write)
        return
    with exits_on_user_error():
        _replace(filename, lambda beside: torch.save(obj, beside))


class WholeCopies(PathManager):
    """fairseq's access to files, except that copies appear whole or not at all."""

    @staticmethod
    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        """Copy a file over another; true when it is done, as fairseq wants to hear."""
        if PathManager.path_requires_pathmanager(src_path) or not PathManager.supports_rename(dst_path):
            return bool(PathManager.copy(src_path, dst_path, overwrite=overwrite))
        with exits_on_user_error():
            _replace(dst_path, lambda beside: shutil.copyfile(src_path, beside))
        return True


def _replace(filename: str, write: Callable[[Path], object]) -> None:
    """Write beside, sync, rename; several tries.

    Raises:
        UserError: it cannot be written; what was at `filename` is there still.
    """
    beside = Path(filename + BESIDE)
    for left in reversed(range(TRIES)):
        try:
            put_in_place(filename, beside, write)
            return
        except (OSError, RuntimeError) as error:
            if left:
                time.sleep(WAIT)
                continue
            beside.unlink(missing_ok=True)
            if not _is_of_writing(error):
                raise
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise UserError(
                f"cannot write {filename}: {reason}; make room there, or give another --save-dir, and give the same "
                "command again: the checkpoint before this one is whole"
            ) from None


def _is_of_writing(error: OSError | RuntimeError) -> bool:
    return is_about_a_file(error) if isinstance(error, OSError) else bool(_TORCH_WRITING.search(str(error)))


def is_whole(path: str | Path) -> bool:
    """Whether a checkpoint's end was written: that of a zip file is the list of what is in it."""
    if zipfile.is_zipfile(path):
        return True
    with open(path, "rb") as file:
        return file.read(len(_LEGACY)) == _LEGACY  # its end says nothing; loading will tell


def newest_whole(filename: str) -> str:
    """`filename`, or, where it is cut, the newest whole checkpoint in its folder.

    Where none is whole it is `filename`, for its loading to refuse: a run never starts from zero by itself.
    """
    last = Path(filename)
    if not last.is_file() or is_whole(last):
        return filename
    others = [path for path in last.parent.glob("checkpoint*.pt") if path != last]
    for path in sorted(others, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if is_whole(path):
            logger.warning(f"{filename} is cut: its writing was interrupted; going on from {path}")
            return str(path)
    return filename
