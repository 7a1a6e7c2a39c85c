"""Check the values in a plan. `where` names the section, rule and key, for the message."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, is_about_a_file


def check_keys(where: str, source: Mapping[str, object], known: Sequence[str]) -> None:
    """Check that all keys are known.

    Raises:
        UserError: `source` has a key that is not in `known`.
    """
    unknown = [str(key) for key in source if key not in known]
    if unknown:
        raise UserError(f"{where}: unknown key '{unknown[0]}'; known keys: {', '.join(known)}")


def check_setting(where: str, value: object) -> None:
    """Check a setting: a whole number from 1 up, or a mapping from regular expressions to such numbers.

    Raises:
        UserError: it is anything else.
    """
    if not isinstance(value, Mapping):
        check_positive(where, value)
        return
    for pattern, number in value.items():
        if isinstance(number, Mapping):
            continue  # the form by type of module, checked by setting_by_feature
        check_regex(where, str(pattern))
        check_positive(f"{where}: '{pattern}'", number)


def check_one_of(where: str, name: str, value: object, known: Sequence[str]) -> None:
    """Check the word that the key `name` has.

    Raises:
        UserError: `value` is not in `known`.
    """
    if value not in known:
        raise UserError(f"{where}: unknown {name} {value!r}; known: {', '.join(known)}")


def check_word(where: str, name: str, value: object, known: Sequence[str]) -> None:
    """Check a word, or a mapping from regular expressions to words, that the key `name` has.

    Raises:
        UserError: a word is not in `known`, or a key of the mapping is no regular expression.
    """
    if not isinstance(value, Mapping):
        check_one_of(where, name, value, known)
        return
    for pattern, word in value.items():
        check_regex(f"{where}: {name}", pattern)
        check_one_of(f"{where}: {name}", f"word for '{pattern}',", word, known)


def check_positive(where: str, value: object) -> None:
    """Check a whole number from 1 up.

    Raises:
        UserError: `value` is anything else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where} is {value!r}; give a whole number from 1 up")


def check_probability(where: str, value: object) -> None:
    """Check a probability.

    Raises:
        UserError: `value` is not a number from 0 to 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"{where} is {value!r}; give a probability from 0 to 1")


def check_regex(where: str, pattern: str) -> None:
    """Check a regular expression.

    Raises:
        UserError: Python cannot compile `pattern`.
    """
    try:
        re.compile(pattern)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{where} rule '{pattern}': not a regular expression ({error})") from None


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Read the mapping in a YAML file.

    Raises:
        UserError: the file cannot be read, is not YAML, or holds no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        if not is_about_a_file(error):
            raise
        raise UserError(f"plan {path}: {error.strerror}; give the path of a YAML file") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date like 2001-99-99
        raise UserError(f"plan {path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, Mapping):
        raise UserError(f"plan {path}: must hold a mapping with noise, stages, …; it holds {type(content).__name__}")
    return content
