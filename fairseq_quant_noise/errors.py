"""The two ways a run ends early, and the exit code of each.

Every message is one line that names the tensor, file or option at fault and the cure. The command line
prints it as ``error: …`` without a traceback; from Python both are ordinary exceptions.
"""

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
