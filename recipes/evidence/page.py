"""Write the page of recipes/evidence.sh: each claim with its verdict, each run over its seeds, and the curves.

    python -m recipes.evidence.page runs/evidence                     from the runs: evidence.{jsonl,md,png} there
    python -m recipes.evidence.page docs --from docs/evidence.jsonl   from the lines alone: the page in docs/

Each line of evidence.jsonl describes one run with one seed: `{"run", "seed", "ppl", "bytes"}`. The bytes of a packed
file are those on disk; those of a dense network are 4 for each number.
"""

import argparse
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.artifact.inspection import inspection
from recipes.evidence.claims import CLAIMS, Finding, find
from recipes.evidence.grid import NETWORKS
from recipes.results import json_lines, perplexity
from recipes.table1.table import markdown

Line = dict[str, Any]
CLAIM_HEADER = ("claim", "paper, PPL", "ours, PPL", "the other, PPL", "difference", "seeds", "verdict")
RUN_HEADER = ("network", "file", "PPL", "bytes", "seeds")
NOTE = """\
"PPL" is the test perplexity that fairseq-eval-lm reports: mean and standard deviation over the seeds. "Difference" is
ours relative to the other: the mean over pairs of runs with the same seed, and its 95 % confidence interval (Student's
t). It must stay below 0, unless the claim names another bound, such as "(3 %)" or "a tenth". A claim holds if the whole
interval is below its bound, and does not hold if the whole interval is above it. Otherwise, and with fewer than three
seeds, it is undecided. The paper's figures are for WikiText-103 and a network of 247 M parameters; "r" marks figures
quoted from memory that were not looked up."""


def collect(out: Path) -> list[Line]:
    """Collect a line for each finished run of each seed."""
    lines = []
    for folder in sorted(out.glob("seed-*")):
        seed = int(folder.name.removeprefix("seed-"))
        for name, network in NETWORKS.items():
            sizes = {}
            for file in network.files:
                log, packed = folder / name / f"eval-{file}.log", folder / name / f"{file}.safetensors"
                if log.exists() and packed.exists():
                    sizes = inspection(packed, read(packed))
                    lines.append(line(f"{name}/{file}", seed, log, sizes["file_bytes"]))
            log = folder / name / "eval-dense.log"
            if log.exists() and sizes:
                lines.append(line(f"{name}/dense", seed, log, sizes["dense_bytes"]))
    return lines


def line(run: str, seed: int, log: Path, n_bytes: int) -> Line:
    """Make a line of evidence.jsonl."""
    return {"run": run, "seed": seed, "ppl": perplexity(log), "bytes": n_bytes}


def spread(values: list[float], form: str = ".1f") -> str:
    """Format the mean and the standard deviation."""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def claim_row(found: Finding) -> tuple[str, ...]:
    """Format a claim as a row under CLAIM_HEADER."""
    percent = [100 * x for x in found.differences]
    error = f" ± {100 * found.margin:.1f}" if len(percent) > 1 else ""
    difference = f"{statistics.mean(percent):+.1f}{error} %"
    claim, n = found.claim, str(len(percent))
    return claim.claim, claim.paper, spread(found.ours), spread(found.other), difference, n, found.verdict


def by_run(lines: list[Line]) -> dict[str, list[Line]]:
    """Group the lines by run."""
    runs = defaultdict(list)
    for entry in lines:
        runs[entry["run"]].append(entry)
    return dict(runs)


def text(lines: list[Line]) -> str:
    """Make the text of the page."""
    scores = {(entry["run"], entry["seed"]): entry["ppl"] for entry in lines}
    findings = [found for claim in CLAIMS if (found := find(claim, scores)).ours]
    rows = [
        (
            *run.split("/"),
            spread([e["ppl"] for e in of]),
            f"{statistics.mean(e['bytes'] for e in of):,.0f}",
            str(len(of)),
        )
        for run, of in sorted(by_run(lines).items())
    ]
    parts = [
        "# The evidence, run by run",
        "",
        "## Claims",
        "",
        *markdown(CLAIM_HEADER, [claim_row(found) for found in findings]),
    ]
    return "\n".join([*parts, "", NOTE, "", "## Runs", "", *markdown(RUN_HEADER, rows)])


def draw(lines: list[Line], path: Path) -> None:
    """Draw perplexity against p, and against bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = by_run(lines)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for file in ("dense", "one-shot", "ipq", "ipq-k64"):
        points = [(p, runs[run]) for run in runs if (p := noise_p(run, file)) is not None]
        errors(left, [(p, [e["ppl"] for e in of]) for p, of in sorted(points, key=lambda point: point[0])], file)
    left.set(xlabel="p of the proxy noise", ylabel="test perplexity", title="How much noise")
    for network in ("none", "proxy-0.05", "shared", "shared-pruned"):
        points = [
            (statistics.mean(e["bytes"] for e in of) / 1000, [e["ppl"] for e in of])
            for run, of in runs.items()
            if run.split("/")[0] == network and run.split("/")[1].startswith(("ipq", "int")) and "first" not in run
        ]
        errors(right, sorted(points), network, line="o")
    right.set(xlabel="kB of the file", ylabel="test perplexity", xscale="log", title="Score against size")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def noise_p(run: str, file: str) -> float | None:
    """Return p of a run of `file` with constant proxy noise, or with none; None for any other run."""
    found = re.fullmatch(r"(?:none|proxy-([\d.]+))/" + re.escape(file), run)
    return None if found is None else float(found[1] or 0)


def errors(axis: Any, points: list[tuple[float, list[float]]], label: str, line: str = "o-") -> None:
    """Draw means with standard deviations."""
    if points:
        xs, means = [x for x, _ in points], [statistics.mean(y) for _, y in points]
        deviations = [statistics.stdev(y) if len(y) > 1 else 0.0 for _, y in points]
        axis.errorbar(xs, means, deviations, fmt=line, ms=4, capsize=3, label=label)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--from", dest="source", type=Path, help="read the lines of this file instead of the runs")
    args = parser.parse_args()
    lines = collect(args.out) if args.source is None else json_lines(args.source)
    if not lines:
        parser.error(f"{args.out} has no finished run; run: bash recipes/evidence.sh")
    page = write(lines, args.out)
    print(f"{page}\n\npage: {args.out / 'evidence.md'}, picture: {args.out / 'evidence.png'}")


def write(lines: list[Line], out: Path) -> str:
    """Write evidence.{jsonl,md,png} to `out`; returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    page = text(lines)
    (out / "evidence.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines), encoding="utf-8")
    (out / "evidence.md").write_text(page + "\n", encoding="utf-8")
    draw(lines, out / "evidence.png")
    return page


if __name__ == "__main__":
    main()
