"""Write a file whole or not at all: beside it, to the disk, then renamed."""

import os
import secrets
import stat
from pathlib import Path

from ..errors import UserError, is_about_a_file


def replace_file(path: str | Path, content: bytes | bytearray) -> None:
    """Write beside `path`, fsync, rename: a reader sees the old file or the new one.

    Who may read it: as of the file that it replaces, and of a new one as the umask has it.

    Raises:
        UserError: the folder is missing, unwritable or full; nothing is left behind.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with open(beside, "xb") as file:  # not by mkstemp, whose files are for their owner alone
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        keep_mode(path, beside)
        os.replace(beside, path)
    except OSError as error:
        if not is_about_a_file(error):
            raise
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place for --out") from None
    finally:
        beside.unlink(missing_ok=True)  # where it has not taken the name


def keep_mode(path: str | Path, beside: str | Path) -> None:
    """Give `beside`, which is about to replace `path`, the permissions of `path`, if there is such a file."""
    if os.path.isfile(path):
        os.chmod(beside, stat.S_IMODE(os.stat(path).st_mode))
