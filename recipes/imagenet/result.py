"""The accuracies and sizes of a run of recipes/imagenet/run.sh:  python -m recipes.imagenet.result OUT..."""

import re
import sys
from pathlib import Path

MIB = 2**20
NETWORKS = ("dense", "int4", "one-shot", "ipq", "ipq-best")


def top(log: Path, k: int) -> float | None:
    """The last top-k accuracy in a log of fairseq-validate, in percent."""
    found = re.findall(rf"\btop{k} ([0-9.]+)", log.read_text(encoding="utf-8")) if log.is_file() else []
    return float(found[-1]) if found else None


def rows(out: Path) -> list[tuple[str, ...]]:
    """A row for each network that was evaluated."""
    found = []
    for name in NETWORKS:
        top1, top5 = (top(out / f"eval-{name}.log", k) for k in (1, 5))
        if top1 is not None:
            file = out / f"{name}.safetensors"
            size = file.stat().st_size if file.is_file() else 0
            found.append(
                (
                    out.name,
                    name,
                    f"{top1:.1f}",
                    f"{top5:.1f}",
                    f"{size:,}" if size else "",
                    f"{size / MIB:.3f}" if size else "",
                )
            )
    return found


def main(folders: list[str]) -> None:
    """Print a Markdown table."""
    print("| run | network | top-1 | top-5 | file bytes | MiB |\n|---|---|---|---|---|---|")
    for folder in folders:
        for row in rows(Path(folder)):
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
