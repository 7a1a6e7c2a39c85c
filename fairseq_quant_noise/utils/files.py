"""Write a file whole or not at all: under another name in the same folder, synced to disk, then renamed."""

import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError, is_about_a_file


def replace_file(path: str | Path, content: bytes | bytearray) -> None:
    """Write beside `path`, fsync, rename: a reader sees the old file or the new one.

    It keeps the permissions of the file that it replaces; a new file gets those that the umask leaves.

    Raises:
        UserError: the folder is missing, unwritable or full; nothing is left behind.
        OSError: another error of the system, such as too many open files.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        put_in_place(path, beside, lambda new: _write_new(new, content))
    except OSError as error:
        if not is_about_a_file(error):
            raise
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from None
    finally:
        beside.unlink(missing_ok=True)  # where it has not taken the name


def put_in_place(path: str | Path, beside: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file `beside`, sync it, and give it the permissions and the name of `path`.

    Where that fails, `path` is as it was, and `beside` may be there.

    Args:
        path: of the file to make or to replace.
        beside: another name in the same folder.
        write: called with `beside`; it writes the whole file.

    Raises:
        OSError: it cannot be written; and whatever `write` raises.
    """
    write(beside)
    with open(beside, "rb") as file:
        os.fsync(file.fileno())
    if os.path.isfile(path):
        os.chmod(beside, stat.S_IMODE(os.stat(path).st_mode))
    os.replace(beside, path)


def _write_new(path: Path, content: bytes | bytearray) -> None:
    with open(path, "xb") as file:  # not by mkstemp, whose files are for their owner alone
        file.write(content)
