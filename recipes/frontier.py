"""Draw what compression costs against how far it goes: the paper's figures beside the committed lines.

docs/frontier.svg is drawn from docs/codes.jsonl and docs/posthoc.jsonl by `python -m recipes.pages`.

A panel is a job: language modelling, MNLI, images. Networks differ between the paper and here, so what is drawn is the
loss of each against the dense network that it was made from.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from fairseq_quant_noise.report.paper import POINTS
from fairseq_quant_noise.report.pictures import COLORS, image, plain_sizes, settings
from fairseq_quant_noise.utils.files import replace_file
from recipes.posthoc.table import DENSE
from recipes.results import json_lines

#: Group -> colour and marker; ours are filled.
GROUPS = {
    "published: the paper": ("#5f6b75", "s"),
    "here: iPQ as in the paper": (COLORS[1], "o"),
    "here: intN": (COLORS[3], "v"),
    "here: quantized at once, no training": (COLORS[7], "^"),
    "here: codes that train": (COLORS[0], "D"),
    "here: codes that train, a budget's plan": (COLORS[2], "*"),
}
PUBLISHED, AS_PAPER, INTEGERS, AT_ONCE, OURS, BUDGET = GROUPS
#: Metric of the paper's points -> title, label of the y axis, the range in which that axis is linear
PANELS = {
    "ppl": ("Language modelling", "perplexity above dense, %", 10.0),
    "accuracy": ("MNLI", "points below dense", 2.0),
    "top1": ("Images", "points below dense", 2.0),
}
TASKS = {"accuracy": "mnli", "top1": "images"}  # of recipes/posthoc.sh


@dataclass(frozen=True)
class Mark:
    """Hold a network: how many times smaller than dense, what it loses, and whether either figure is recalled."""

    group: str
    ratio: float
    loss: float
    recalled: bool = False


def loss(metric: str, score: float, dense: float) -> float:
    """What is drawn: points of accuracy, or per cent of perplexity."""
    return 100 * (score / dense - 1) if metric == "ppl" else dense - score


def group(run: str) -> str:
    """The group of a run of recipes/codes.sh, or of a method of recipes/posthoc.sh."""
    if run.startswith("budget") and run.endswith("best"):
        return BUDGET
    if run.endswith(("@once", "@feedback")):
        return AT_ONCE
    if run.endswith("best"):
        return OURS
    return INTEGERS if "int" in run else AS_PAPER


def published(metric: str) -> list[Mark]:
    """The paper's rows."""
    dense, *rows = POINTS[metric]
    return [
        Mark(
            PUBLISHED,
            ratio=dense.megabytes / row.megabytes,
            loss=loss(metric, row.score, dense.score),
            recalled=row.recalled or dense.recalled,
        )
        for row in rows
    ]


def language_models(lines: Iterable[dict[str, Any]]) -> list[Mark]:
    """A mark for each run of recipes/codes.sh, the mean over its seeds."""
    runs = defaultdict(list)
    for line in lines:
        ratio = line["dense_bytes"] / line["file_bytes"]
        runs[line["run"]].append((ratio, loss("ppl", line["ppl"], line["dense_ppl"])))
    return [Mark(group(run), *map(mean, zip(*of, strict=True))) for run, of in runs.items()]


def networks(metric: str, lines: Iterable[dict[str, Any]]) -> list[Mark]:
    """A mark for each method of recipes/posthoc.sh on the metric's task, the mean over its seeds."""
    of_task = [line for line in lines if line["task"] == TASKS[metric]]
    network = ("network", "seed", "noise")
    dense = {tuple(line[key] for key in network): line["score"] for line in of_task if line["method"] == DENSE}
    runs = defaultdict(list)
    for line in of_task:
        before = dense.get(tuple(line[key] for key in network))
        if line["method"] != DENSE and before is not None:
            of = runs[line["network"], line["noise"], line["method"]]
            of.append((line["ratio"], loss(metric, line["score"], before)))
    return [Mark(group(method), *map(mean, zip(*of, strict=True))) for (_, _, method), of in runs.items()]


def marks(docs: Path) -> dict[str, list[Mark]]:
    """The marks of each panel."""
    codes, posthoc = (json_lines(docs / f"{name}.jsonl") for name in ("codes", "posthoc"))
    ours = {"ppl": language_models(codes)} | {metric: networks(metric, posthoc) for metric in TASKS}
    return {metric: published(metric) + ours[metric] for metric in PANELS}


def picture(found: dict[str, list[Mark]]) -> bytes:
    """The picture, as SVG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import SymmetricalLogLocator

    with settings():
        figure = Figure(figsize=(10.5, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (metric, (title, what, linear)) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
            for mark in found[metric]:
                color, marker = GROUPS[mark.group]
                face = "white" if mark.recalled else color
                axes.plot(mark.ratio, mark.loss, marker, color=color, mfc=face, ms=8 if marker == "*" else 5.5)
            axes.axhline(0, color="#999999", ls="--", lw=1, zorder=0)
            axes.set(title=title, xlabel="times smaller than dense", ylabel=what, xscale="log")
            axes.set_yscale("symlog", linthresh=linear)
            axes.margins(0.08)
            axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear, subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
            plain_sizes(axes)
        for name, (color, marker) in GROUPS.items():
            axes.plot([], [], marker, color=color, label=name)
        axes.plot([], [], "s", color=GROUPS[PUBLISHED][0], mfc="white", label=f"{PUBLISHED}, recalled")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        return image(figure, "svg")


def write(docs: Path) -> None:
    """Draw frontier.svg in `docs` from the lines there."""
    replace_file(docs / "frontier.svg", picture(marks(docs)))
