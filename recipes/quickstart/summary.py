"""The quickstart's table and picture.

    python recipes/quickstart/summary.py runs/quickstart

reads the results of the three runs and writes table.md and picture.png beside them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MIB = 2**20
RUNS = {"no-noise": "iPQ, as in the paper", "quant-noise": "+ Quant-Noise", "ours": "ours: budget, codes that train"}
COLORS = ("#c9793f", "#5f6b75", "#1e6fb3")
HEADER = ("run", "dense PPL", "one-shot PPL", "PPL", "dense MiB", "file MiB", "ratio")


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
    """Perplexity of each run, dense and quantized, before and after fine-tuning."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    keys = ("ppl_dense", "ppl_one_shot", "ppl_ipq")
    for i, ((name, run), color) in enumerate(zip(runs.items(), COLORS, strict=True)):
        places = [k + (i - 1) * 0.27 for k in range(3)]
        bars = axes.bar(places, [run[key] for key in keys], 0.25, color=color, label=RUNS[name])
        axes.bar_label(bars, fmt="%.0f", fontsize=9, padding=2)
    run = runs["ours"]
    dense, packed = f"{run['dense_bytes'] / MIB:.2f} MiB", f"{run['file_bytes'] / MIB:.2f} MiB"
    labels = (f"dense\n{dense}", f"quantized, one-shot\n{packed}", f"quantized, fine-tuned\n{packed}")
    axes.set_xticks(range(3), labels)
    axes.set_ylabel("test perplexity (lower is better)")
    axes.set_title(f"A file {run['ratio']:.0f} times smaller, and what it costs")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Print the table, write it and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    runs = {name: json.loads((out / name / "result.json").read_text()) for name in RUNS}
    text = table([row(RUNS[name], run) for name, run in runs.items()])
    (out / "table.md").write_text(text + "\n")
    picture(runs, out / "picture.png")
    print(f"\n{text}\n\ntable: {out / 'table.md'}\npicture: {out / 'picture.png'}")
    print("files:", *(str(out / name / "model.safetensors") for name in runs))


if __name__ == "__main__":
    main()
