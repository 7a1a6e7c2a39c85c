"""Find the plans that come with the package by name: `--plan small` is configs/plans/small.yaml."""

import os
from pathlib import Path

from ..errors import UserError

_PACKAGE = Path(__file__).parents[1]


def plan_path(source: str | Path) -> Path:
    """The file that a user means: the one at this path, else the shipped plan of this name.

    Raises:
        UserError: a bare name that is neither; the message lists the shipped plans.
    """
    path, name = Path(source), str(source)
    if os.path.exists(path) and not path.is_dir():
        return path
    shipped = shipped_plans()
    if name in shipped:
        return shipped[name]
    if path.name != name or path.suffix or os.path.exists(path):
        return path  # a path: reading it says what is wrong
    raise UserError(f"plan {name}: no such file, and no shipped plan has this name; there are {', '.join(shipped)}")


def shipped_plans() -> dict[str, Path]:
    """Name -> file. A wheel has the files inside the package, a checkout beside it."""
    folders = (root / "configs" / "plans" for root in (_PACKAGE, _PACKAGE.parent))
    folder = next((folder for folder in folders if folder.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.yaml"))}
