"""How a user's mistake ends a process: one line on standard error, an exit code, no traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import UserError


@contextmanager
def exits_on_user_error() -> Iterator[None]:
    """Inside fairseq's programs and our own commands: a UserError becomes `error: …` and the exit code.

    SystemExit also passes through fairseq's `except Exception`, which would replace the message by its own.
    """
    try:
        yield
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
