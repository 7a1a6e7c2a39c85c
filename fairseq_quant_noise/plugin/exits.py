"""End fairseq's programs on a user's mistake with one line on standard error and an exit code, without traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ..errors import UserError, end_program

_PROGRAMS = "fairseq_cli"  # the package of fairseq's programs


@contextmanager
def exits_on_user_error(always: bool = False) -> Iterator[None]:
    """In a program, a UserError becomes `error: …` and its exit code; a caller in Python gets the UserError itself.

    SystemExit also passes through the `except Exception` of fairseq's programs, which would replace the message by
    their own.

    Args:
        always: for what is a program's start.
    """
    try:
        yield
    except UserError as error:
        if not always and not _in_a_program():
            raise
        end_program(error)


def _in_a_program() -> bool:
    """Whether one of fairseq's programs is among the callers: an installed one, a module or a script."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        names = frame.f_globals
        spec, name = names.get("__spec__"), names.get("__name__", "")
        if name == "__main__":
            name = spec.name if spec is not None else Path(names.get("__file__", "")).parent.name
        if name.partition(".")[0] == _PROGRAMS:
            return True
        frame = frame.f_back
    return False
