"""Write regular expressions that match some names of weights exactly, and are short where the names have a pattern."""

import re
from collections.abc import Iterable, Sequence

_Numbers = tuple[str, ...]


def expression(names: Iterable[str], known: Iterable[str]) -> str:
    r"""A regular expression whose full matches among `known` are `names`.

    Names that differ in their numbers alone become one, such as `layers\.\d+\.fc1` for all of them that are known, or
    `layers\.(0|2)\.fc1` for some; then those that differ in their last part alone, such as `layers\.\d+\.(fc1|fc2)`.

    Args:
        names: some of `known`.
        known: every name that the expression is matched against.
    """
    wanted, others = _by_shape(names), _by_shape(known)
    numbered = [part for shape, numbers in wanted.items() for part in _numbered(shape, numbers, others[shape])]
    stems: dict[str, list[str]] = {}
    for parts in numbered:
        stems.setdefault(r"\.".join(parts[:-1]), []).append(parts[-1])
    return "|".join(
        (rf"{stem}\." if stem else "") + (ends[0] if len(ends) == 1 else f"({'|'.join(ends)})")
        for stem, ends in stems.items()
    )


def _by_shape(names: Iterable[str]) -> dict[tuple[str, ...], list[_Numbers]]:
    """The names by their parts, numbers left out as "": ("layers", "", "fc1") -> [("0",), ("1",)]."""
    found: dict[tuple[str, ...], list[_Numbers]] = {}
    for name in names:
        parts = name.split(".")
        shape = tuple("" if part.isdecimal() else part for part in parts)
        found.setdefault(shape, []).append(tuple(part for part in parts if part.isdecimal()))
    return found


def _numbered(shape: Sequence[str], wanted: Sequence[_Numbers], known: Sequence[_Numbers]) -> list[list[str]]:
    """Expressions for the parts of the names of one shape: one for all, or one for each where no product says which."""
    if set(wanted) == set(known):
        sets = [r"\d+"] * len(wanted[0])
        return [_filled(shape, sets)]
    columns = [list(dict.fromkeys(column)) for column in zip(*wanted, strict=True)]
    product = 1
    for column in columns:
        product *= len(column)
    if product == len(wanted):
        return [_filled(shape, [c[0] if len(c) == 1 else f"({'|'.join(c)})" for c in columns])]
    return [_filled(shape, numbers) for numbers in wanted]


def _filled(shape: Sequence[str], numbers: Sequence[str]) -> list[str]:
    left = iter(numbers)
    return [re.escape(part) if part else next(left) for part in shape]
