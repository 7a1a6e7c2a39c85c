"""Read the logs of fairseq-train and `quantize`: validations, stages, encoding errors, distortion, time.

A log may be of any length and hold anything, so lines of any other form are skipped.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_STAGE = re.compile(r"stage (\d{1,6}) of (\d{1,6}): quantizing \d{1,9} weights, '(.*)'")
_ENCODED = re.compile(r"(?:stage (\d{1,6}) of \d+ )?\[\d+/\d+\] (\S+) \([\d, ]+\) (.*?)relative error (\d+(?:\.\d+)?)")
_VALID = re.compile(r"\| epoch \d+ \| valid on '(\w+)' subset \| (.*)")
_INNER = re.compile(r"\| (?:train_inner|train) \| epoch +\d+(?::| \|) (.*)")
_DONE = re.compile(r"done training in (\d+(?:\.\d+)?) seconds")
_WORD = re.compile(r"\b([A-Za-z_]\w*)[= ](-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?=[,| ]|$)")
_JSON = re.compile(r"\| (train_inner|train|valid) \| (\{.*\})\s*$")
_DISTORTION = re.compile(r"distortion_(\w+)_(weight|output)")
_LINE_OF_UPDATES = "| train_inner |"  # its figures are of the updates since the last one
CODES_CHANGED, LATENT_ERROR = "ipq_codes_changed", "ipq_distortion"  # while codes train


@dataclass(frozen=True)
class Validation:
    """Hold the figures of a validation, its update, and its stage (0 before the first)."""

    update: int
    stage: int
    subset: str
    values: dict[str, float]


@dataclass(frozen=True)
class Encoded:
    """Hold the relative error of a weight's encoding: ||W - W_hat|| / ||W||."""

    tensor: str
    how: str
    error: float
    stage: int | None


@dataclass
class Log:
    """Hold the content of one log file."""

    path: Path
    validations: list[Validation] = field(default_factory=list)
    stages: dict[int, tuple[int, str]] = field(default_factory=dict)  # number from 1: (update, rule)
    n_stages: int = 0
    encoded: dict[str, Encoded] = field(default_factory=dict)  # by tensor, the last time
    distortion: dict[tuple[str, str], list[tuple[int, float]]] = field(default_factory=dict)  # (kind, weight | output)
    codes_changed: list[tuple[int, float]] = field(default_factory=list)  # (update, per cent of all, by one encoding)
    latent_error: list[tuple[int, float]] = field(default_factory=list)  # (update, ||W_hat - latent|| / ||latent||)
    seconds: float | None = None  # sum over all trainings that ended
    update: int = 0
    stage: int = 0


def read_log(path: Path) -> Log:
    """Read the log at `path`."""
    log = Log(path)
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            _take(log, line.rstrip("\n"))
    return log


def _take(log: Log, line: str) -> None:
    if done := _DONE.search(line):
        log.seconds = (log.seconds or 0.0) + (finite(done[1]) or 0.0)
    elif stage := _STAGE.search(line):
        log.stage, log.n_stages = int(stage[1]), int(stage[2])
        log.stages[log.stage] = (log.update, stage[3])
    elif encoded := _ENCODED.search(line):
        which, error = int(encoded[1]) if encoded[1] else None, finite(encoded[4])
        if error is not None:
            log.encoded[encoded[2]] = Encoded(encoded[2], encoded[3].strip(), error, which)
    else:
        for kind, subset, values in _figures(line):
            _take_figures(log, kind, subset, values)
            if _LINE_OF_UPDATES in line:
                for name, series in ((CODES_CHANGED, log.codes_changed), (LATENT_ERROR, log.latent_error)):
                    if name in values:
                        series.append((log.update, values[name]))


def _figures(line: str) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Read (train or valid, subset, figures) from a line of progress, in fairseq's log format simple or json."""
    if found := _JSON.search(line):
        try:
            content = json.loads(found[2])
        except (ValueError, RecursionError):
            return
        yield (
            found[1],
            "valid",
            _finite((str(k).removeprefix("train_").removeprefix("valid_"), content[k]) for k in content),
        )
    elif found := _VALID.search(line):
        yield "valid", found[1], _finite(_WORD.findall(found[2]))
    elif found := _INNER.search(line):
        yield "train", "train", _finite(_WORD.findall(found[1]))


def _finite(pairs: Iterable[tuple[str, object]]) -> dict[str, float]:
    """Keep the pairs whose value is a number (None is logged where there is no figure)."""
    return {name: number for name, value in pairs if (number := finite(value)) is not None}


def finite(value: object) -> float | None:
    """Convert `value` to a number; None if it is none, or not finite."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _take_figures(log: Log, kind: str, subset: str, values: dict[str, float]) -> None:
    log.update = int(values.get("num_updates", log.update))
    if kind == "valid":
        log.validations.append(Validation(log.update, log.stage, subset, values))
    for name, value in values.items():
        if found := _DISTORTION.fullmatch(name):
            series = log.distortion.setdefault((found[1], found[2]), [])
            if not series or series[-1][0] != log.update:
                series.append((log.update, value))
