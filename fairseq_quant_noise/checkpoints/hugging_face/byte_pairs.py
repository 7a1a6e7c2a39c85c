"""Number byte pairs as GPT-2's encoder.json does, since the symbols of a RoBERTa's dict.txt are these numbers.

The numbers follow from the merges: first the 256 bytes, each as a visible letter, then what each merge makes.
"""

from collections.abc import Iterable

_END = "<|endoftext|>"
_VISIBLE = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))


def byte_letters() -> list[str]:
    """A letter for each of the 256 bytes, in GPT-2's order: those that are visible, then stand-ins for the others."""
    others = 256 - len(_VISIBLE)
    return [*map(chr, _VISIBLE), *(chr(256 + i) for i in range(others))]


def numbers_of(merges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """The number of each byte pair, as in encoder.json."""
    names = dict.fromkeys([*byte_letters(), *("".join(merge) for merge in merges), _END])
    return {name: i for i, name in enumerate(names)}
