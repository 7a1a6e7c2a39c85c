"""Collect points of score and size: NAME.safetensors goes with eval-NAME.log, the dense network with eval-dense.log.

Where logs or files are gone, result.json and tables of JSON lines stand in for them. The same figure of the same run is
taken once.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .logs import finite

#: Scores that are better when lower; all others are better when higher.
LOWER = ("ppl", "loss")
METRICS = {"ppl": "PPL", "accuracy": "accuracy, %", "bleu": "BLEU", "top1": "top-1, %", "top5": "top-5, %"}
_STAGED = re.compile(rf"({'|'.join(METRICS)})_(\w+)")
_PPL = re.compile(r"Loss \(base 2\): [\d.]+, Perplexity: (\d{1,99}(?:\.\d+)?)\s")
_VALID = re.compile(r"valid on '(\w+)' subset \|(.*)")
_BLEU = re.compile(r"\bBLEU\S* = (\d+(?:\.\d+)?)")
_DATA = re.compile(r"'data': '([^']+)'")
_LABELS = {"model": "ipq", "one_shot": "one-shot", "packed": "ipq"}


@dataclass(frozen=True)
class Point:
    """Hold the score and the bytes of a network of a run, dense or as a packed file."""

    run: str
    label: str  # dense, ipq, one-shot, int4 ...
    metric: str  # a key of METRICS
    score: float
    bytes: float
    source: str  # the file that says so
    data: str  # what it was evaluated on: only such points are compared

    @property
    def mib(self) -> float:
        """Convert the bytes to MiB, bytes / 2^20."""
        return self.bytes / 2**20


def label_of(stem: str) -> str:
    """Make the label of a network from its file's name; files named `model` and `packed` come from iPQ."""
    return _LABELS.get(stem, stem)


def scores_in(log: Path) -> dict[str, float]:
    """Read the figures in a log of fairseq-eval-lm, -validate or -generate, preferably of the subset `valid`."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if found := _PPL.findall(text):
        return {"ppl": float(found[-1])}
    scores: dict[str, float] = {}
    for subset, line in _VALID.findall(text):
        for metric in ("accuracy", "top1", "top5"):
            value = re.search(rf"\b{metric} (\d+(?:\.\d+)?)", line)
            if value and (subset == "valid" or metric not in scores):
                scores[metric] = float(value[1])
    if scores:
        return scores
    bleu = _BLEU.findall(text)
    return {"bleu": float(bleu[-1])} if bleu else {}


def data_of(log: Path) -> str | None:
    """Read the data set that the log names."""
    found = _DATA.search(log.read_text(encoding="utf-8", errors="replace"))
    return found[1] if found else None


def read_json_lines(path: Path) -> Iterator[Mapping[str, object]]:
    """Read the objects in a file of JSON lines (or of one object); lines of another kind are passed over."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            yield record


def points_of_result(record: Mapping[str, object], run: str, source: str, data: str) -> Iterator[Point]:
    """Read the points of result.json: `ppl_dense`, `ppl_ipq` ... with `dense_bytes`, `file_bytes`."""
    for key, value in record.items():
        if found := _STAGED.fullmatch(str(key)):
            size = record.get("dense_bytes" if found[2] == "dense" else "file_bytes")
            value = value.get("valid") if isinstance(value, dict) else value
            yield from _point(run, label_of(found[2]), found[1], value, size, source, data)


def points_of_row(record: Mapping[str, object], run: str, source: str, data: str) -> Iterator[Point]:
    """Read the points of a table's line: `ppl` ... or `score`, with `file_bytes` or `bytes`; or as in result.json."""
    yield from points_of_result(record, run, source, data)
    size = record.get("file_bytes", record.get("bytes"))
    label = str(record.get("scheme") or record.get("row") or record.get("file") or "").strip()
    if not label and "/" in str(record.get("run")):  # recipes/evidence.sh: NETWORK/FILE
        run, _, label = run.rpartition("/")
    for metric in METRICS:
        if metric in record:
            yield from _point(run, label or "?", metric, record[metric], size, source, data)
    if "score" in record:
        metric = "ppl" if "PPL" in str(record.get("model", "PPL")) else "accuracy"
        yield from _point(run, label or "?", metric, record["score"], size, source, data)


def _point(run: str, label: str, metric: str, score: object, size: object, source: str, data: str) -> Iterator[Point]:
    value, size = finite(score), finite(size)
    if value is not None and size is not None and size > 0:
        yield Point(run, label, metric, value, size, source, data)


def distinct(points: list[Point]) -> list[Point]:
    """Keep each figure once: the first of those with the same run, score and bytes."""
    seen: dict[tuple[str, str, float, float], Point] = {}
    for p in points:
        seen.setdefault((p.run, p.metric, round(p.score, 2), p.bytes), p)
    return list(seen.values())


def pareto(points: list[Point]) -> list[Point]:
    """Select the points that no other beats in both score and bytes (the Pareto front), by growing size."""
    front: list[Point] = []
    for p in sorted(points, key=lambda p: (p.bytes, _cost(p))):
        if not front or _cost(p) < _cost(front[-1]):
            front.append(p)
    return front


def _cost(p: Point) -> float:
    return p.score if p.metric in LOWER else -p.score
