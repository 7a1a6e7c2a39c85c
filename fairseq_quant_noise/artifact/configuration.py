"""Check a packed file's configuration of its network: plain values only, and no more of them than a network has.

fairseq and `load` build the network that the configuration describes before they look at a weight, and fairseq gives
some options to Python's eval and every text to omegaconf. So what could run, or build without end, ends here.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import DamagedFileError

_MOST_VALUES, _MOST_ITEMS, _DEEPEST = 20_000, 1_000, 6
_MOST_LAYERS, _MOST_POSITIONS, _LARGEST = 1_000, 1 << 17, 2**53
_POSITIONS = re.compile(r"tokens_per_sample|.*positions")
#: Options that fairseq's models give to eval(), and what is in the lists of numbers that belong there.
EVALUATED = ("adaptive_input_cutoff", "adaptive_softmax_cutoff", "character_filters")
_NUMBERS = re.compile(r"[\d\s.,()\[\]]*")
_REFERENCE = re.compile(r"\$\{(\w+)\.(\w+)\}")


def check_configuration(config: Mapping[str, Any]) -> None:
    """Refuse a `Manifest.model` that no network can have.

    Raises:
        DamagedFileError: too many values, lists too long or too deep, implausibly large numbers, or text that fairseq
            or omegaconf would evaluate; the message names the option.
    """
    cfg = config.get("cfg", {})
    if not isinstance(cfg, dict) or not all(isinstance(section, dict) for section in cfg.values()):
        raise DamagedFileError("its configuration is damaged (no sections of options)")
    for count, (name, value) in enumerate(_values(config)):
        if count >= _MOST_VALUES:
            raise DamagedFileError(f"its configuration is damaged (more than {_MOST_VALUES:,} values)")
        wrong = _wrong_text(name, value, cfg) if isinstance(value, str) else _wrong_number(name, value)
        if wrong:
            raise DamagedFileError(f"its configuration is damaged (option {name}: {wrong})")


def check_evaluated(options: Mapping[str, Any]) -> None:
    """Refuse code in an option that fairseq gives to eval().

    Raises:
        DamagedFileError: such an option holds anything but a list of numbers; the message names the option.
    """
    for name in EVALUATED:
        value = options.get(name)
        if isinstance(value, str) and not _NUMBERS.fullmatch(value):
            raise DamagedFileError(f"option {name} is {value!r}, which fairseq would run; it must be a list of numbers")


def _values(config: object) -> Iterator[tuple[str, object]]:
    """Iterate over the options as (name, value); each item of a list comes under the list's name."""
    left: list[tuple[str, object, int]] = [("", config, 0)]
    while left:
        name, value, depth = left.pop()
        if not isinstance(value, dict | list):
            yield name, value
            continue
        if depth > _DEEPEST or (depth > 1 and len(value) > _MOST_ITEMS) or len(value) > _MOST_VALUES:
            raise DamagedFileError(f"its configuration is damaged (option {name}: too long or too deep)")
        items = value.items() if isinstance(value, dict) else ((name, item) for item in value)
        left += [(key, item, depth + 1) for key, item in items]
        yield name, None  # so that empty lists count too


def _wrong_text(name: str, text: str, cfg: Mapping[str, Mapping[str, Any]]) -> str | None:
    if name in EVALUATED and not _NUMBERS.fullmatch(text):
        return f"{text!r} is no list of numbers"
    if "${" not in text:
        return None
    found = _REFERENCE.fullmatch(text)
    target = cfg.get(found[1], {}).get(found[2]) if found else text
    return f"{text!r} would run when it is read" if isinstance(target, str) and "${" in target else None


def _wrong_number(name: str, value: object) -> str | None:
    if not isinstance(value, int | float):
        return None
    most = _MOST_LAYERS if name.endswith("layers") else _MOST_POSITIONS if _POSITIONS.fullmatch(name) else _LARGEST
    return None if math.isfinite(value) and abs(value) <= most else f"{value!r} is implausibly large (limit {most:g})"
