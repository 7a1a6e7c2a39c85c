"""The table of a post-hoc run: score before and after, bytes, ratio and milliseconds a sentence, over its seeds.

    python -m recipes.posthoc.table OUT NETWORK

reads {dense,METHOD}.json and METHOD.safetensors in OUT/TASK/seed-S/noise-P, and writes a line a file to
OUT/posthoc.jsonl, and OUT/table.md (a row a method, the mean over seeds and the spread from lowest to highest).
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fairseq_quant_noise.accounting import MIB
from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.artifact.inspection import inspection

DENSE = "dense"


def lines(out: Path, network: str) -> Iterator[dict[str, Any]]:
    """A line for each file of `network` that has been scored, dense ones first."""
    for found in sorted(out.glob("*/seed-*/noise-*/*.json"), key=lambda path: (path.parent, path.stem != DENSE, path)):
        run = {
            "network": network,
            "task": found.parts[-4],
            "seed": int(found.parts[-3][5:]),
            "noise": float(found.parts[-2][6:]),
        }
        line = {**run, "method": found.stem, **json.loads(found.read_text())}
        packed = found.with_suffix(".safetensors")
        if packed.exists():
            info = inspection(packed, read(packed))
            line |= {key: info[key] for key in ("dense_bytes", "paper_bytes", "ratio")}
        yield line


def table(found: Iterable[dict[str, Any]]) -> str:
    """The rows of a table in Markdown."""
    groups: dict[tuple[str, str, float, str], list[dict[str, Any]]] = defaultdict(list)
    before: dict[tuple[str, str, float, int], float] = {}
    for line in found:
        of = (line["network"], line["task"], line["noise"])
        groups[*of, line["method"]].append(line)
        if line["method"] == DENSE:
            before[*of, line["seed"]] = line["score"]
    head = ("network", "task", "noise", "method", "seeds", "score", "before", "file MiB", "ratio", "ms a sentence")
    rows = [_row(head), _row(["---"] * len(head))]
    for (network, task, noise, method), runs in groups.items():
        dense = [before[of] for run in runs if (of := (network, task, noise, run["seed"])) in before]
        ratio = "" if method == DENSE else f"x{_mean(run['ratio'] for run in runs):.1f}"
        score = [run["score"] for run in runs]
        spread = f"{_mean(score):.1f}" + (f" ({min(score):.1f} to {max(score):.1f})" if len(score) > 1 else "")
        size = "" if method == DENSE else f"{_mean(run['bytes'] for run in runs) / MIB:.2f}"
        cells = (network, task, f"{noise:g}", method, len(runs), spread, f"{_mean(dense):.1f}" if dense else "")
        rows.append(_row((*cells, size, ratio, f"{_mean(run['ms'] for run in runs):.1f}")))
    return "\n".join(rows)


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)


def main() -> None:
    """Write and print the table."""
    if len(sys.argv) != 3:
        sys.exit("error: give the folder of the run and a name: python -m recipes.posthoc.table OUT NETWORK")
    out = Path(sys.argv[1])
    found = list(lines(out, sys.argv[2]))
    (out / "posthoc.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    (out / "table.md").write_text(table(found) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
