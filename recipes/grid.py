"""A grid of settings whose results are lines of a file, so that a run that was stopped goes on with what is missing."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from recipes.results import json_lines

S = TypeVar("S")  # a dataclass


def missing(settings: Iterable[S], lines: Path) -> Iterator[S]:
    """The settings that have no line when their turn comes; other processes may write to the file meanwhile."""
    for setting in settings:
        done = json_lines(lines) if lines.exists() else []
        if not any(asdict(setting).items() <= line.items() for line in done):  # type: ignore[call-overload]
            yield setting


def add(line: dict[str, Any], lines: Path) -> None:
    """Append and print the line of a setting: its fields, and what was found."""
    with lines.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(line, flush=True)
