"""Define the two errors that end a run, and the exit code of each.

Every message is one line that names the tensor, file or option at fault and the cure. The command line
prints it as ``error: …`` without a traceback; from Python both are ordinary exceptions.
"""

import errno
import sys
from typing import NoReturn

_LONGEST = 2000  # characters of a message: a file's names may be of any length


class UserError(ValueError):
    """The caller's mistake: a wrong option, plan, path or model. Exit code 2."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())  # one line, even if a name in it holds line breaks
        line = "".join(letter if letter.isprintable() else "?" for letter in line)  # no control characters
        super().__init__(line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…")


class DamagedFileError(UserError):
    """A packed file that is damaged, hostile or of an unknown version. Exit code 3."""

    exit_code = 3


def end_program(error: UserError) -> NoReturn:
    """End this program with `error: …` on standard error and the error's exit code.

    Raises:
        SystemExit: always, with the exit code, and with `error` as its cause.
    """
    sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(error.exit_code) from error


#: System errors that mean no room is left; they come while an open file is written, and name no file.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
#: System errors about a file, a folder or a disk that the user named.
_OF_FILES = NO_ROOM | {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE),
}


def is_about_a_file(error: OSError) -> bool:
    """Whether another path or more room is the cure, unlike for a lost connection, say, or too many open files."""
    return error.errno in _OF_FILES
