"""The two ways a run ends early, and the exit code of each.

Every message is one line that names the tensor, file or option at fault and the cure. The command line
prints it as ``error: …`` without a traceback; from Python both are ordinary exceptions.
"""


class UserError(ValueError):
    """The caller's mistake: a wrong option, plan, path or model. Exit code 2."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # one line, whatever a name or a pattern in it holds


class DamagedFileError(UserError):
    """A packed file that is damaged, hostile or of an unknown version. Exit code 3."""

    exit_code = 3
