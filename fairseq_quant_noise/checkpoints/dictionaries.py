"""Read the dictionaries that fairseq's speech tasks pickle into a checkpoint, without fairseq's unpickling code."""

from dataclasses import dataclass
from typing import Any

from .pickled_config import Placeholder
from .pickled_numbers import RefusedError

_NAME = "fairseq.data.dictionary.Dictionary"


@dataclass(frozen=True)
class SavedDictionary:
    """A Dictionary's attributes, by fairseq's names: words, counts, indices, and the words with a special meaning."""

    fields: dict[str, Any]


def with_dictionaries(state: dict[str, Any]) -> dict[str, Any]:
    """Replace each pickled dictionary in a task's state, alone or in a list, by a SavedDictionary.

    Raises:
        RefusedError: a dictionary holds anything but words and whole numbers.
    """
    return {name: [*map(_saved, value)] if isinstance(value, list) else _saved(value) for name, value in state.items()}


def _saved(value: object) -> object:
    """The SavedDictionary of a placeholder for a Dictionary; any other value as it is. Raises RefusedError."""
    if not isinstance(value, Placeholder) or value.name != _NAME:
        return value
    fields = value.state

    def is_plain(value: object) -> bool:
        return isinstance(value, str | int | None)

    def is_sound(value: object) -> bool:
        if isinstance(value, dict):
            return all(map(is_plain, (*value, *value.values())))
        return all(map(is_plain, value)) if isinstance(value, list) else is_plain(value)

    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise RefusedError("its pickle holds a dictionary of words that is none")
    if not all(map(is_sound, fields.values())):
        raise RefusedError("its pickle holds a dictionary with more in it than words and numbers")
    return SavedDictionary(fields)
