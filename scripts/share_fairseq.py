"""Lets a new virtual environment use the fairseq that the interpreter which made it can import already.

A fairseq from git main, or one built for a cluster, must not be replaced by ours. Where there is one, its
site-packages (with torch and the rest) are appended to the path of the new environment, which can then add
packages of its own and changes nothing outside; and the fairseq-* commands are written for the new interpreter.

    python scripts/share_fairseq.py .venv
"""

import importlib.metadata
import sys
import sysconfig
from pathlib import Path

SCRIPT = "#!{python}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"


def fairseq_folder() -> Path | None:
    """The folder that holds the importable `fairseq`, or None."""
    sys.path.pop(0)  # the folder of this script
    try:
        import fairseq
    except Exception:  # not there, or not for this Python or torch: as good as not there
        return None
    return Path(fairseq.__file__).resolve().parent.parent


def site_folders(fairseq: Path) -> list[Path]:
    """Where this interpreter keeps its packages, and fairseq's own folder (a git checkout, say)."""
    folders = [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    return folders if fairseq in folders else [*folders, fairseq]


def write_commands(binaries: Path) -> None:
    """fairseq-train and its like, for the interpreter beside them."""
    for entry in importlib.metadata.entry_points(group="console_scripts"):
        if entry.name.startswith("fairseq-") and entry.module.startswith("fairseq_cli"):
            text = SCRIPT.format(python=binaries / "python", module=entry.module, function=entry.attr)
            (binaries / entry.name).write_text(text, encoding="utf-8")
            (binaries / entry.name).chmod(0o755)


def main() -> int:
    """0 when a fairseq is shared, 1 when there is none."""
    environment = Path(sys.argv[1]).resolve()
    fairseq = fairseq_folder()
    if fairseq is None:
        return 1
    paths = {"base": str(environment), "platbase": str(environment)}
    target = Path(sysconfig.get_path("purelib", scheme="venv", vars=paths))
    lines = [f"import site; site.addsitedir({str(folder)!r})\n" for folder in site_folders(fairseq)]
    (target / "outer_fairseq.pth").write_text("".join(lines), encoding="utf-8")
    write_commands(environment / "bin")
    print(f"using the fairseq in {fairseq}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
