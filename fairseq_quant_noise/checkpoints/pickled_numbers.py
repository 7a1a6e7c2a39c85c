"""Read numpy's numbers in a checkpoint, such as the counts behind BLEU, without numpy's own unpickling.

Classes of this module stand in for numpy's types, scalars and arrays, and keep what the pickle says; `with_arrays`
makes arrays of numbers from that at the end. Objects, records, texts and dates are refused.
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
    """Says which part of a file is refused, and why; `safe_load` adds the file's name."""


class NumberType:
    """Stands in for `numpy.dtype`: a type code and a byte order.

    Raises:
        RefusedError: the type is not a boolean, integer or float of up to 8 bytes.
    """

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in _CODES:
            raise RefusedError(
                f"its pickle holds a number of numpy's type {code!r}; booleans, integers and floats can be read"
            )
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if state[1] == ">" else "<"


def scalar(kind: NumberType, data: bytes) -> float:
    """Convert a pickled numpy scalar to a Python number."""
    number: float = struct.unpack(kind.order + _CODES[kind.code], data)[0]
    return number


class PickledArray:
    """Stands in for `numpy.ndarray`: the state that the pickle sets."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> "np.ndarray[Any, Any]":
        """The array that the state describes.

        Raises:
            RefusedError: the state is not that of an array of numbers, or the numbers do not fill its shape.
        """
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


def _empty_array(*_: object) -> PickledArray:
    """Stand in for numpy's `_reconstruct`, after which the pickle sets the array's state."""
    return PickledArray()


def allowed() -> list[tuple[Callable[..., Any], str]]:
    """The globals of such numbers in numpy 1 and 2, in the form that `torch.serialization.safe_globals` takes."""
    both: list[tuple[Callable[..., Any], str]] = []
    for core in ("core", "_core"):
        both += [(scalar, f"numpy.{core}.multiarray.scalar"), (_empty_array, f"numpy.{core}.multiarray._reconstruct")]
    return [*both, (NumberType, "numpy.dtype"), (PickledArray, "numpy.ndarray")]


def with_arrays(value: Any, done: dict[int, Any] | None = None) -> Any:
    """`value` with numpy arrays in place of each PickledArray; dicts and lists are changed in place.

    Args:
        value: as unpickled.
        done: the objects already visited, by id: parts may be shared, and a list may hold itself.

    Raises:
        RefusedError: see `PickledArray.array`.
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
