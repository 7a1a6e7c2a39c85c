"""The two ways a run ends early, and the exit code of each.

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
        line = " ".join(message.split())  # one line, whatever a name or a pattern in it holds
        line = "".join(letter if letter.isprintable() else "?" for letter in line)  # and it steers no terminal
        super().__init__(line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…")


class DamagedFileError(UserError):
    """A packed file that is damaged, hostile or of an unknown version. Exit code 3."""

    exit_code = 3


def end_program(error: UserError) -> NoReturn:
    """End this program as a user's mistake ends one: `error: …` on standard error, and the exit code.

    Raises:
        SystemExit: with the code; with the code, and `error` as its cause.
    """
    sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(error.exit_code) from error


#: The system's errors in writing a file that is open, which name no file: no room left, of several kinds.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
#: Its errors about a file, a folder or a disk that the user named.
_OF_FILES = NO_ROOM | {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE),
}


def is_about_a_file(error: OSError) -> bool:
    """Whether another path, or more room, is the cure: not of a lost connection, say, or too many open files."""
    return error.errno in _OF_FILES
