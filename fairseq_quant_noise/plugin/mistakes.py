"""Turn missing data, wrong dictionaries and full disks in fairseq's programs into one-line UserErrors.

fairseq ends in a traceback where a data folder is not there, the disk is full, or a checkpoint meets a dictionary that
it was not trained on. Here these are the user's mistakes as all others: one line that says the cure, exit code 2.
"""

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ..errors import NO_ROOM, UserError, is_about_a_file
from ..layers.parts import CODES
from .exits import exits_on_user_error

R = TypeVar("R")
_KEYS = [re.compile(rf"{kind} key\(s\) in state_dict: (.*)") for kind in ("Missing", "Unexpected")]
_NAME = re.compile(r'"([^"]+)"')
_MISMATCH = re.compile(r"size mismatch for (\S+): .*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)")


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Turn errors about a file, weights that do not fit and an option that names no file into UserErrors.

    Any other error passes unchanged, with its traceback, since no cure is known for it.

    Raises:
        UserError: inside, there was an OSError about a file or a full disk, a RuntimeError of torch about weights that
            do not fit the model, or a ValueError of fairseq about an option whose file does not exist.
    """
    try:
        yield
    except OSError as error:
        line = _of_the_system(error)
        if line is None:
            raise
        raise UserError(line) from error
    except RuntimeError as error:
        mismatch = mismatch_in(error)
        if mismatch is None:
            raise
        raise UserError(mismatch) from error
    except ValueError as error:
        if isinstance(error, UserError) or not re.fullmatch(r"--\S+ .* does not exist", str(error)):
            raise
        raise UserError(f"{error}; give the path of a checkpoint") from error


def mismatch_in(error: BaseException | None) -> str | None:
    """Describe in one line weights that do not fit the model, from torch's error or the one it came from; else None."""
    while error is not None:
        text = str(error)
        if (found := _MISMATCH.search(text)) is not None:
            return (
                f"{found[1]}: is {found[2]} in the file and {found[3]} in the model; give the data folder whose "
                "dict.txt the file was trained with, and the model's own options"
            )
        missing, unexpected = ([*_NAME.findall(line[1])] if (line := _KEYS[k].search(text)) else [] for k in (0, 1))
        codes = [name for name in unexpected if name.endswith(f".{CODES}")]
        if codes:
            return (
                f"{codes[0]}: the file holds this weight in codes, and the model cannot; train with the --arch "
                "quant_noise_… that it was made with"
            )
        if missing or unexpected:
            where = "the model and not in the file" if missing else "the file and not in the model"
            return (
                f"{(missing or unexpected)[0]}: is in {where}, with {len(missing + unexpected) - 1} more that only "
                "one of them has; give the architecture, layers and options that the file was trained with"
            )
        error = error.__cause__ or error.__context__
    return None


def _of_the_system(error: OSError) -> str | None:
    """The message for an error about a file or a full disk; None for any other."""
    if error.errno is None:  # in fairseq's words: a data set or a model file that is not there
        if not isinstance(error, FileNotFoundError) and "file not found" not in str(error):
            return None
        data = "give the folder that fairseq-preprocess wrote, with this split in it"
        return f"{error}; {data if 'Dataset' in str(error) else 'give the path of a file that is there'}"
    if error.filename is None:  # while a file is written
        return f"{error.strerror}; make room, or give another --save-dir" if error.errno in NO_ROOM else None
    if not is_about_a_file(error):
        return None
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return (
            f"{error.filename}: {error.strerror}; give the folder that fairseq-preprocess wrote, or the path of a file"
        )
    return f"{error.filename}: {error.strerror}; give another place, or make room"


def in_a_line(function: Callable[..., R], is_program: bool) -> Callable[..., R]:
    """Wrap `function` so that errors in files, options and shapes are UserErrors; a program ends with one line."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> R:
        with exits_on_user_error(always=is_program), as_user_errors():
            return function(*args, **kwargs)

    return run
