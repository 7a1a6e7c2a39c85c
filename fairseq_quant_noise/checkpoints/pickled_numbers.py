"""Numbers of numpy in a checkpoint, such as the counts behind BLEU, without numpy's own unpickling.

Types, scalars and arrays are answered by classes of this module that keep what the pickle says; arrays of numbers
are made of it at the end (`with_arrays`). Objects, records, texts and dates are refused.
"""

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

_CODES = {"b1": "?", "f2": "e", "f4": "f", "f8": "d"} | {
    f"{sign}{size}": (letter.upper() if sign == "u" else letter)
    for sign in "iu"
    for size, letter in ((1, "b"), (2, "h"), (4, "i"), (8, "q"))
}


class RefusedError(Exception):
    """What in a file is refused, and why; `safe_load` adds the file."""


class NumberType:
    """What `numpy.dtype` is called with, and its byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in _CODES:
            raise RefusedError(
                f"its pickle holds a number of numpy's type {code!r}; booleans, integers and floats can be read"
            )
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if state[1] == ">" else "<"


def scalar(kind: NumberType, data: bytes) -> float:
    """A number of numpy as Python's."""
    number: float = struct.unpack(kind.order + _CODES[kind.code], data)[0]
    return number


class PickledArray:
    """What a pickle says of an array."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> "np.ndarray[Any, Any]":
        """The numbers. Raises RefusedError where the state is not that of an array of numbers."""
        try:
            _, shape, kind, by_columns, data = self.state
            dtype = np.dtype(kind.order + kind.code)
            if math.prod(shape) == 0:  # whose bytes are a call of `bytes`
                return np.empty(shape, dtype)
            numbers = np.frombuffer(data, dtype).copy()
            if numbers.size != math.prod(shape):
                raise ValueError(f"{numbers.size} numbers do not make the shape {shape}")
            return numbers.reshape(shape, order="F" if by_columns else "C")
        except (TypeError, ValueError, AttributeError) as error:
            raise RefusedError(f"its pickle holds an array of numpy that is none ({error})") from None


def _empty_array(*_: Any) -> PickledArray:
    """Stand in for numpy's `_reconstruct`, after which the pickle sets the array's state."""
    return PickledArray()


def allowed() -> list[tuple[Callable[..., Any], str]]:
    """The globals that such numbers call for, of numpy 1 and 2, as `torch.serialization.safe_globals` takes them."""
    both: list[tuple[Callable[..., Any], str]] = []
    for core in ("core", "_core"):
        both += [(scalar, f"numpy.{core}.multiarray.scalar"), (_empty_array, f"numpy.{core}.multiarray._reconstruct")]
    return [*both, (NumberType, "numpy.dtype"), (PickledArray, "numpy.ndarray")]


def with_arrays(value: Any, done: dict[int, Any] | None = None) -> Any:
    """`value` with its arrays in place of what the pickle said of them; dicts and lists are changed in place.

    Args:
        value: as unpickled.
        done: what has been visited, by its id: parts may be shared, a list may hold itself.
    """
    done = {} if done is None else done
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, dict | list):
        done[id(value)] = value
        for key in value if isinstance(value, dict) else range(len(value)):
            value[key] = with_arrays(value[key], done)
        return value
    if isinstance(value, PickledArray):
        done[id(value)] = value.array()
    elif type(value) is tuple:
        done[id(value)] = tuple(with_arrays(part, done) for part in value)
    return done.get(id(value), value)
