"""What fairseq-train and `quantize` leave in a log: validations, stages, errors of the encoding, distortion, time.

A log may be of any length and hold anything, so lines that do not fit are passed over.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_STAGE = re.compile(r"stage (\d+) of (\d+): quantizing (\d+) weights, '(.*)'")
_ENCODED = re.compile(r"(?:stage (\d+) of \d+ )?\[\d+/\d+\] (\S+) \([\d, ]+\) (.*?)\s*relative error ([\d.]+)")
_VALID = re.compile(r"\| epoch \d+ \| valid on '(\w+)' subset \| (.*)")
_INNER = re.compile(r"\| (?:train_inner|train) \| epoch +\d+(?::| \|) (.*)")
_DONE = re.compile(r"done training in ([\d.]+) seconds")
_WORD = re.compile(r"([A-Za-z_]\w*)[= ](-?[\d.]+(?:e-?\d+)?)(?=[,| ]|$)")
_JSON = re.compile(r"\| (train_inner|train|valid) \| (\{.*\})\s*$")
_DISTORTION = re.compile(r"distortion_(\w+)_(weight|output)")


@dataclass(frozen=True)
class Validation:
    """A validation: after how many updates, in which stage (0 before the first), and the figures."""

    update: int
    stage: int
    subset: str
    values: dict[str, float]


@dataclass(frozen=True)
class Encoded:
    """A weight as it was quantized: ||W - W_hat|| / ||W||."""

    tensor: str
    how: str
    error: float
    stage: int | None


@dataclass
class Log:
    """The content of one log file."""

    path: Path
    validations: list[Validation] = field(default_factory=list)
    stages: dict[int, tuple[int, str]] = field(default_factory=dict)  # number from 1: (update, rule)
    n_stages: int = 0
    encoded: dict[str, Encoded] = field(default_factory=dict)  # by tensor, the last time
    distortion: dict[tuple[str, str], list[tuple[int, float]]] = field(default_factory=dict)  # (kind, weight | output)
    seconds: float | None = None  # of all trainings that ended
    update: int = 0
    stage: int = 0


def read_log(path: Path) -> Log:
    """The log at `path`."""
    log = Log(path)
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            _take(log, line.rstrip("\n"))
    return log


def _take(log: Log, line: str) -> None:
    if done := _DONE.search(line):
        log.seconds = (log.seconds or 0.0) + float(done[1])
    elif stage := _STAGE.search(line):
        log.stage, log.n_stages = int(stage[1]), int(stage[2])
        log.stages[log.stage] = (log.update, stage[4])
    elif encoded := _ENCODED.search(line):
        which = int(encoded[1]) if encoded[1] else None
        log.encoded[encoded[2]] = Encoded(encoded[2], encoded[3], float(encoded[4]), which)
    else:
        for kind, subset, values in _figures(line):
            _take_figures(log, kind, subset, values)


def _figures(line: str) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(train or valid, subset, figures) of a line of progress, in fairseq's log format simple or json."""
    if found := _JSON.search(line):
        try:
            content = json.loads(found[2])
        except ValueError:
            return
        values = {str(k).removeprefix("train_").removeprefix("valid_"): _number(v) for k, v in content.items()}
        yield found[1], "valid", {k: v for k, v in values.items() if v is not None}
    elif found := _VALID.search(line):
        yield "valid", found[1], {k: float(v) for k, v in _WORD.findall(found[2])}
    elif found := _INNER.search(line):
        yield "train", "train", {k: float(v) for k, v in _WORD.findall(found[1])}


def _number(value: object) -> float | None:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _take_figures(log: Log, kind: str, subset: str, values: dict[str, float]) -> None:
    log.update = int(values.get("num_updates", log.update))
    if kind == "valid":
        log.validations.append(Validation(log.update, log.stage, subset, values))
    for name, value in values.items():
        if found := _DISTORTION.fullmatch(name):
            series = log.distortion.setdefault((found[1], found[2]), [])
            if not series or series[-1][0] != log.update:
                series.append((log.update, value))
