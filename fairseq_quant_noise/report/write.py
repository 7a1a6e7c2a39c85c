"""Write the report: a folder with index.html, which needs no other file, its pictures as PNGs, and report.json."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import UserError, is_about_a_file
from ..utils.files import replace_file
from .page import page
from .pictures import pictures
from .runs import Runs, find_runs

PAGE = "index.html"


def write_report(folders: Iterable[str | Path], out: str | Path) -> Runs:
    """Read the runs in `folders` and write REPORT/index.html, the pictures beside it, and report.json with the numbers.

    Args:
        folders: finished runs, or folders above them.
        out: the folder of the report, made if need be; files of an earlier report in it are replaced.

    Raises:
        UserError: there are no results, matplotlib is not installed, or `out` cannot be written.
    """
    out = Path(out)
    runs = find_runs(folders)
    drawn = pictures(runs)
    text = page(runs, drawn)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if not is_about_a_file(error):
            raise
        raise UserError(f"--out {out}: {error.strerror}; give a folder") from None
    for picture in drawn:
        replace_file(out / f"{picture.name}.png", picture.png)
    replace_file(out / "report.json", json.dumps(numbers(runs), indent=1).encode())
    replace_file(out / PAGE, text.encode("utf-8", "replace"))  # last: it stands for a whole report
    return runs


def numbers(runs: Runs) -> dict[str, Any]:
    """Convert the figures of the page to plain values."""
    return {
        "folders": runs.folders,
        "points": [asdict(p) for p in runs.points],
        "codebooks": [{"run": f.run, "file": f.name, **asdict(use)} for f in runs.files for use in f.use],
        "distortion": [
            {"run": run, "log": log.path.name, **asdict(e)} for run, log in runs.logs for e in log.encoded.values()
        ],
        "validations": [
            {"run": run, "log": log.path.name, **asdict(v)} for run, log in runs.logs for v in log.validations
        ],
        "codes": [
            {"run": run, "log": log.path.name, "changed": log.codes_changed, "latent_error": log.latent_error}
            for run, log in runs.logs
            if log.codes_changed
        ],
        "steps": [asdict(step) for step in runs.steps],
        "notes": runs.notes,
    }
