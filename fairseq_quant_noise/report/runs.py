"""Find the runs in and below the folders that the caller names: the files that a recipe leaves there.

A folder is a run when it holds result.json, a packed file or a log of an evaluation. steps.jsonl and tables of JSON
lines may stand in it or above it. What cannot be read becomes a note on the page and stops nothing.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifact import read
from ..artifact.codebooks import CodebookUse, codebook_use
from ..artifact.inspection import inspection
from ..artifact.reader import SUFFIX
from ..checkpoints.checkpoint import Checkpoint
from ..errors import UserError
from .logs import Log, finite, read_log
from .scores import Point, data_of, distinct, label_of, points_of_result, points_of_row, read_json_lines, scores_in

_DEPTH = 4  # folders below a named one
STEPS = "steps.jsonl"


@dataclass(frozen=True)
class Step:
    """Hold a step of a recipe."""

    run: str
    name: str
    seconds: float
    command: str
    recipe: str  # the command that a person gave


@dataclass
class File:
    """Hold what is known about a packed file."""

    run: str
    label: str
    name: str  # the file's name
    info: dict[str, Any]  # the keys of `inspect --json`
    use: list[CodebookUse]


@dataclass
class Runs:
    """Hold all that the page shows."""

    folders: list[str]
    names: list[str] = field(default_factory=list)  # the runs' names
    points: list[Point] = field(default_factory=list)
    files: list[File] = field(default_factory=list)
    logs: list[tuple[str, Log]] = field(default_factory=list)  # (run, training or quantization)
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be read, or is missing


def find_runs(folders: Iterable[str | Path]) -> Runs:
    """Find everything in `folders` and below.

    Raises:
        UserError: a folder does not exist, or no folder holds a result.
    """
    roots = [Path(folder) for folder in folders]
    for root in roots:
        if not root.is_dir():
            raise UserError(f"report {root}: no such folder; give the folder of a finished run, a recipe's OUT")
    runs = Runs([str(root) for root in roots])
    names: dict[Path, tuple[str, Path]] = {}  # folder: (name on the page, root it is below)
    for root in roots:
        for folder in _below(root):
            inside = folder.relative_to(root)
            name = str(Path(root.resolve().name) / inside if len(roots) > 1 or folder == root else inside)
            names.setdefault(folder.resolve(), (name, root.resolve()))
    for folder, (name, _) in names.items():
        _read_folder(runs, name, folder)
    for folder, (name, root) in names.items():  # after the logs and files that these stand in for
        _read_tables(runs, name, folder, root)
    runs.points = distinct(runs.points)
    if not (runs.points or runs.files):
        raise UserError(
            f"report {' '.join(runs.folders)}: no result in it (result.json, a table of JSON lines, a packed file); "
            "run a recipe first, such as `bash recipes/quickstart.sh`, and give its OUT folder"
        )
    return runs


def _below(root: Path) -> list[Path]:
    found = []
    for path, inner, _ in os.walk(root):
        folder = Path(path)
        inner[:] = sorted(inner) if len(folder.relative_to(root).parts) < _DEPTH else []
        found.append(folder)
    return found


def _read_folder(runs: Runs, name: str, folder: Path) -> None:
    _read_steps(runs, name, folder)
    files = sorted(folder.glob(f"*{SUFFIX}"))
    evals = sorted(folder.glob("eval-*.log"))
    if files or evals or (folder / "result.json").exists():
        runs.names.append(name)
        _read_run(runs, name, folder, files, evals)


def _read_run(runs: Runs, name: str, folder: Path, files: list[Path], evals: list[Path]) -> None:
    paths = sorted({*folder.glob("*.log")} - {*evals}) or [folder / "log"]  # table2.sh writes one file `log`
    logs = [read_log(path) for path in paths if path.is_file()]
    for log in logs:
        if log.stages:
            _exact_starts(runs, name, log, folder / log.path.stem / "checkpoint_last.pt")
    runs.logs += [(name, log) for log in logs if log.validations or log.encoded or log.seconds or log.distortion]
    if not any(log.stages for log in logs):
        runs.notes.append(f"{name}: no log of a training with stages, so no score over the stages")
    sizes: dict[str, int] = {}
    dense: int | None = None
    for path in files:
        try:
            packed = read(path)
            uses = codebook_use(packed)
            file = File(name, label_of(path.stem), path.name, inspection(path, packed, uses), uses)
        except UserError as error:  # damaged files too
            runs.notes.append(f"{name}: {path.name} is left out: {str(error).removeprefix(str(path)).lstrip(': ')}")
            continue
        runs.files.append(file)
        sizes[file.label], dense = file.info["file_bytes"], file.info["dense_bytes"]
    for path in evals:
        label = label_of(path.stem.removeprefix("eval-"))
        size = dense if label == "dense" else sizes.get(label)
        _score(runs, name, label, path, size)
        sizes.pop(label, None)
    unscored = [file.name for file in runs.files if file.run == name and file.label in sizes]
    if unscored:
        runs.notes.append(f"{name}: no evaluation (eval-NAME.log) of {', '.join(unscored)}")


def _exact_starts(runs: Runs, name: str, log: Log, checkpoint: Path) -> None:
    """Take the update at which each stage began from the staged checkpoint; a log gives it only to the nearest line."""
    if not checkpoint.is_file():
        return
    try:
        state = Checkpoint(checkpoint).stages
        starts = [int(state["origin"]) + int(start) for start in state["starts"][: state["done"]]]
    except UserError as error:
        runs.notes.append(f"{name}: {log.path.stem}/{checkpoint.name} is left out: {error}")
    except (KeyError, TypeError, ValueError, AttributeError):
        runs.notes.append(f"{name}: {log.path.stem}/{checkpoint.name} does not say when its stages began")
    else:
        rules = {n: rule for n, (_, rule) in log.stages.items()}
        log.stages.update({n: (at, rules[n]) for n, at in enumerate(starts, 1) if n in rules})


def _score(runs: Runs, name: str, label: str, log: Path, size: int | None) -> None:
    scores = scores_in(log)
    if not scores:
        runs.notes.append(f"{name}: no score in {log.name}")
    elif size is None:
        missing = "packed file to tell the bytes of the dense network" if label == "dense" else "packed file of it"
        runs.notes.append(f"{name}: {log.name} has a score, and there is no {missing}")
    else:
        data = data_of(log) or str(log.parent.parent.resolve())
        runs.points += [Point(name, label, metric, value, size, log.name, data) for metric, value in scores.items()]


def _read_tables(runs: Runs, name: str, folder: Path, root: Path) -> None:
    """Read result.json and tables of JSON lines, except for networks that already have a point from their log."""
    known = {(p.run, p.label, p.metric) for p in runs.points}
    for path in sorted(folder.glob("*.json*")):
        if path.name == STEPS or path.suffix not in (".json", ".jsonl"):
            continue
        take = points_of_row if path.suffix == ".jsonl" else points_of_result
        for record in read_json_lines(path):
            run = name if path.suffix == ".json" else _run_named(name, root, folder, record)
            points = take(record, run, path.name, _data_of_run(runs, run, str(root)))
            runs.points += [p for p in points if (p.run, p.label, p.metric) not in known]


def _data_of_run(runs: Runs, run: str, root: str) -> str:
    """Find the data set that a run was evaluated on, by its logs or else all logs, if they agree; else `root`."""
    own = {p.data for p in runs.points if p.run == run} or {p.data for p in runs.points}
    return own.pop() if len(own) == 1 else root


def _run_named(name: str, root: Path, folder: Path, record: Mapping[str, Any]) -> str:
    """Name the folder of a line of a table, as the page calls it."""
    run = record.get("run")
    if not isinstance(run, str):
        return name
    if isinstance(record.get("seed"), int):  # recipes/evidence.sh
        run = f"seed-{record['seed']}/{run}"
    return run if folder == root and name == root.name else f"{name}/{run}"


def _read_steps(runs: Runs, name: str, folder: Path) -> None:
    path = folder / STEPS
    if not path.is_file():
        return
    for record in read_json_lines(path):
        seconds = finite(record.get("seconds"))
        if seconds is not None:
            words = [str(record.get(key, "")) for key in ("step", "command", "recipe")]
            runs.steps.append(Step(name, words[0], seconds, words[1], words[2]))
