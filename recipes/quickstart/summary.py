"""The quickstart's table and picture.

    python recipes/quickstart/summary.py runs/quickstart

reads the result of both runs and writes table.md and picture.png beside them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MIB = 2**20
HEADER = ("run", "dense PPL", "PPL one-shot iPQ", "PPL iPQ", "dense MiB", "file MiB", "ratio")


def row(name: str, run: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    return (
        name,
        f"{run['ppl_dense']:.2f}",
        f"{run['ppl_one_shot']:.2f}",
        f"{run['ppl_ipq']:.2f}",
        f"{run['dense_bytes'] / MIB:.2f}",
        f"{run['file_bytes'] / MIB:.3f}",
        f"x{run['ratio']:.1f}",
    )


def table(rows: list[tuple[str, ...]]) -> str:
    """Markdown, with columns as wide as their widest entry."""
    widths = [max(len(r[i]) for r in [HEADER, *rows]) for i in range(len(HEADER))]
    rule = tuple("-" * w for w in widths)
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in [HEADER, rule, *rows]
    ]
    return "\n".join(lines)


def picture(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Perplexity against size: from the dense model to the packed one, for both runs."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (name, run), color in zip(runs.items(), ("#b3541e", "#1e6fb3"), strict=True):
        sizes = [run["dense_bytes"] / MIB, run["file_bytes"] / MIB, run["file_bytes"] / MIB]
        scores = [run["ppl_dense"], run["ppl_one_shot"], run["ppl_ipq"]]
        axes.plot(sizes, scores, ":", color=color, alpha=0.6)
        axes.plot(sizes[:1], scores[:1], "o", color=color, label=f"{name}: dense")
        axes.plot(sizes[1:2], scores[1:2], "x", color=color, label=f"{name}: iPQ, one-shot")
        axes.plot(sizes[2:], scores[2:], "s", color=color, label=f"{name}: iPQ, fine-tuned")
        for x, y in zip(sizes, scores, strict=True):
            axes.annotate(f"{y:.1f}", (x, y), textcoords="offset points", xytext=(7, 3), fontsize=8, color=color)
    axes.set(xscale="log", xlabel="size, MiB (log scale)", ylabel="test perplexity (lower is better)")
    axes.set_title("Quant-Noise: what the file costs in perplexity")
    axes.margins(x=0.2, y=0.15)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Print the table, write it and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    runs = {name: json.loads((out / name / "result.json").read_text()) for name in ("no-noise", "quant-noise")}
    text = table([row(name, run) for name, run in runs.items()])
    (out / "table.md").write_text(text + "\n")
    picture(runs, out / "picture.png")
    print(f"\n{text}\n\ntable: {out / 'table.md'}\npicture: {out / 'picture.png'}")
    print("files:", *(str(out / name / "model.safetensors") for name in runs))


if __name__ == "__main__":
    main()
