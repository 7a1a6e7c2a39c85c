"""Draw the pictures of a report with matplotlib, each of one idea and narrow enough to be read on a phone."""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .logs import Log
from .paper import POINTS, TITLES
from .runs import File, Runs
from .scores import METRICS, Point, pareto

COLORS = ("#1e6fb3", "#c9793f", "#3c8d5a", "#8a4f9e", "#b33c4a", "#5f6b75", "#b39a1e", "#2aa0a4")
MARKERS = "osD^vPX*<>hd"
_SIZE = (4.4, 3.6)  # inches: on a phone of 360 points a letter of 10 is then one of 8
_IN_LAYER = re.compile(r"(.*?)\b(?:layers|blocks)\.(\d+)\.(.*?)(?:\.weight)?$")
_MOST_BARS = 16
_MOST_NAMES = 14  # in a legend; the table has all
MOST = 24  # pictures of layers in a section; report.json has all numbers
_SEED = re.compile(r"^seed-\d+/")


@dataclass(frozen=True)
class Picture:
    """Hold a PNG and what it shows."""

    section: str  # the page's section it belongs to
    name: str  # the file's name
    title: str
    png: bytes


def pictures(runs: Runs) -> list[Picture]:
    """Draw every picture for which there are figures.

    Raises:
        UserError: matplotlib is not installed.
    """
    with settings():
        return [*_scores(runs), *_stages(runs), *_codes(runs), *_by_layer(runs), *_time(runs)]


@contextmanager
def settings() -> Iterator[None]:
    """The settings of matplotlib that all pictures have, inside the context.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib; run `pip install 'matplotlib>=3.8,<4'`") from None
    chosen: dict[Any, Any] = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.parse_math": False,
        "svg.hashsalt": "",  # the same bytes for the same figures
    }
    with matplotlib.rc_context(chosen):
        yield


def figure_and_axes(height: float = _SIZE[1]) -> tuple[Any, Any]:
    """A figure of `height` inches, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def image(figure: Any, kind: str) -> bytes:
    """The figure as an image, of kind png or svg."""
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return content.getvalue()


def _png(figure: Any) -> bytes:
    return image(figure, "png")


def short(text: str, most: int = 28) -> str:
    """Cut `text` in the middle where it is long, and leave out what a font cannot draw."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    text = f" {text}" if text.startswith("_") else text  # which a legend would leave out
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most - most // 2) :]}"


def legend(figure: Any, axes: Any, columns: int = 2) -> None:
    """Name what the axes show below them."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)


def groups(points: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    """Group points that may be compared, by metric and data set."""
    found: dict[tuple[str, str], list[Point]] = {}
    for p in points:
        found.setdefault((p.metric, p.data), []).append(p)
    return found


def _scores(runs: Runs) -> Iterable[Picture]:
    for i, ((metric, data), points) in enumerate(groups(runs.points).items()):
        figure, axes = figure_and_axes(4.3)
        _draw_points(axes, points)
        axes.set_xscale("log")
        axes.set_xlabel("MiB on disk (dense: 4 bytes a number)")
        axes.set_ylabel(METRICS[metric])
        plain_sizes(axes)
        legend(figure, axes)
        yield Picture("score", f"score-{i + 1}", f"{METRICS[metric]} against size, {data}", _png(figure))
    for metric in dict.fromkeys(p.metric for p in runs.points):
        if metric in POINTS:
            yield _paper(metric)


def _draw_points(axes: Any, points: Sequence[Point]) -> None:
    names = list(dict.fromkeys(_SEED.sub("", p.run) for p in points))
    labels = list(dict.fromkeys(p.label for p in points))
    front = pareto(list(points))
    axes.plot(
        [p.mib for p in front], [p.score for p in front], "--", color="#999999", lw=1, zorder=1, label="Pareto front"
    )
    for p in points:
        color, marker = (
            COLORS[names.index(_SEED.sub("", p.run)) % len(COLORS)],
            MARKERS[labels.index(p.label) % len(MARKERS)],
        )
        axes.plot(p.mib, p.score, marker, color=color, ms=7, mec="white", mew=0.6, zorder=2)
    for i, name in enumerate(names[:_MOST_NAMES]):
        axes.plot([], [], "s", color=COLORS[i % len(COLORS)], label=short(name))
    for i, label in enumerate(labels[:_MOST_NAMES]):
        axes.plot([], [], MARKERS[i % len(MARKERS)], color="#555555", mfc="none", label=short(label))


def plain_sizes(axes: Any) -> None:
    """Write sizes as numbers, and not as powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axes.get_xlim()
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)


def _paper(metric: str) -> Picture:
    figure, axes = figure_and_axes(4.3)
    for recalled in (False, True):
        chosen = [p for p in POINTS[metric] if p.recalled is recalled]
        face, label = ("white", "recalled, not looked up") if recalled else (COLORS[0], "seen in the paper or its code")
        axes.plot([p.megabytes for p in chosen], [p.score for p in chosen], "o", color=COLORS[0], mfc=face, label=label)
    for p in POINTS[metric]:
        noise = "Quant-Noise" in p.name
        name, away = p.name.replace("Quant-Noise", "QN"), (0, -11) if noise else (0, 5)
        at = (p.megabytes, p.score)
        axes.annotate(name, at, xytext=away, textcoords="offset points", ha="center", fontsize=7.5)
    axes.set_xscale("log")
    axes.set_xlabel("MB, as the paper counts")
    axes.set_ylabel(METRICS[metric])
    axes.margins(x=0.2, y=0.12)
    plain_sizes(axes)
    legend(figure, axes)
    return Picture("score", f"paper-{metric}", f"The paper's points: {TITLES[metric]} (QN: Quant-Noise)", _png(figure))


def staged(runs: Runs) -> list[tuple[str, Log]]:
    """Select the logs of trainings with stages that have a validation."""
    return [(run, log) for run, log in runs.logs if log.stages and log.validations]


def metric_of(log: Log) -> str | None:
    """Choose the figure of a log's validations that is drawn over the stages."""
    names = {name for v in log.validations for name in v.values}
    return next((name for name in ("accuracy", "top1", "bleu", "ppl", "loss") if name in names), None)


def _stages(runs: Runs) -> Iterable[Picture]:
    by_metric: dict[str, list[tuple[str, Log]]] = {}
    for run, log in staged(runs):
        if metric := metric_of(log):
            by_metric.setdefault(metric, []).append((run, log))
    for metric, logs in by_metric.items():
        figure, axes = figure_and_axes()
        for i, (run, log) in enumerate(logs):
            points = [
                (v.update, v.values[metric]) for v in log.validations if metric in v.values and v.subset == "valid"
            ]
            if not points:
                continue  # only points of other splits, which the table shows
            color = COLORS[i % len(COLORS)]
            axes.plot(*zip(*points, strict=True), "o-", color=color, ms=4, label=short(f"{run}: {log.path.stem}"))
            for update, _ in log.stages.values():
                axes.axvline(update, color=color, lw=0.8, ls=":", zorder=0)
        axes.set_xlabel("updates of fine-tuning (dotted: a stage begins)")
        axes.set_ylabel(f"validation {METRICS.get(metric, metric)}")
        axes.grid(alpha=0.25)
        legend(figure, axes)
        yield Picture("stages", f"stages-{metric}", f"{METRICS.get(metric, metric)} over the stages", _png(figure))


def _codes(runs: Runs) -> Iterable[Picture]:
    logs = [(run, log) for run, log in runs.logs if log.codes_changed]
    pairs = (
        ("codes", "Codes that change", "per cent of all codes, an encoding", [log.codes_changed for _, log in logs]),
        ("latent", "Distance to the latent weights", "||Ŵ - latent|| / ||latent||", [g.latent_error for _, g in logs]),
    )
    for name, title, what, drawn in pairs:
        if not any(drawn):
            continue
        figure, axes = figure_and_axes()
        for i, ((run, log), series) in enumerate(zip(logs, drawn, strict=True)):
            if series:
                color = COLORS[i % len(COLORS)]
                axes.plot(*zip(*series, strict=True), "-", color=color, label=short(f"{run}: {log.path.stem}"))
        axes.set_xlabel("updates of fine-tuning")
        axes.set_ylabel(what)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        legend(figure, axes)
        yield Picture("codes", name, title, _png(figure))


def layer_of(tensor: str) -> tuple[str, int | None]:
    """Read (kind, layer) of a tensor: `decoder.layers.3.fc1.weight` -> (`fc1`, 3); outside of layers (name, None)."""
    found = _IN_LAYER.fullmatch(tensor)
    if not found:
        return tensor.removesuffix(".weight").removeprefix("decoder."), None
    side = "encoder " if found[1].startswith("encoder") else ""
    return side + found[3], int(found[2])


def _by_layer(runs: Runs) -> Iterable[Picture]:
    for i, (run, log) in enumerate([(r, g) for r, g in runs.logs if g.encoded][:MOST]):
        values = [(e.tensor, e.error) for e in log.encoded.values()]
        title = f"Relative error by layer: {run}, {log.path.name}"
        yield _layers("distortion", f"distortion-{i + 1}", title, values, "||W - Ŵ|| / ||W||")
    for i, file in enumerate([f for f in runs.files if f.use][:MOST]):
        yield _codebook_picture(i, file)


def _codebook_picture(i: int, file: File) -> Picture:
    values = [(use.tensor, use.entropy) for use in file.use]
    title = f"Entropy of the codes: {file.run}, {file.name}"
    capacities = {use.capacity for use in file.use}
    return _layers("codebooks", f"codebooks-{i + 1}", title, values, "bits a code", capacities)


def _layers(
    section: str, name: str, title: str, values: list[tuple[str, float]], what: str, lines: Iterable[float] = ()
) -> Picture:
    """Draw a line for each kind of weight over the layers; weights outside layers stand at the left, as layer `-`."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for tensor, value in values:
        kind, layer = layer_of(tensor)
        kinds.setdefault(kind, []).append((-1 if layer is None else layer, value))
    figure, axes = figure_and_axes()
    for i, (kind, points) in enumerate(kinds.items()):
        style = f"{MARKERS[i % len(MARKERS)]}-"
        axes.plot(*zip(*sorted(points), strict=True), style, color=COLORS[i % len(COLORS)], ms=5, label=short(kind, 22))
    for line in lines:
        axes.axhline(line, color="#999999", ls="--", lw=1, zorder=0)
    numbers = sorted({layer for points in kinds.values() for layer, _ in points})
    axes.set_xticks(numbers[:: max(len(numbers) // 12, 1)])
    axes.xaxis.set_major_formatter(lambda x, _: "-" if x < 0 else f"{x:g}")
    axes.set_xlabel("layer (-: outside of the layers)")
    axes.set_ylabel(what)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    legend(figure, axes)
    return Picture(section, name, title, _png(figure))


def times(runs: Runs) -> list[tuple[str, float]]:
    """List (what, seconds) for each step of the recipes, or from the training logs of a run without steps."""
    with_steps = {step.run for step in runs.steps}
    found = [(f"{s.name}" if s.name.startswith(f"{s.run}:") else f"{s.run}: {s.name}", s.seconds) for s in runs.steps]
    for run, log in runs.logs:
        if log.seconds is not None and run not in with_steps:
            found.append((f"{run}: training in {log.path.name}", log.seconds))
    return found


def _time(runs: Runs) -> Iterable[Picture]:
    longest = sorted(times(runs), key=lambda pair: -pair[1])[:_MOST_BARS]
    if not longest:
        return
    figure, axes = figure_and_axes(0.9 + 0.27 * len(longest))
    axes.barh(range(len(longest)), [seconds for _, seconds in longest], color=COLORS[0], height=0.7)
    axes.set_yticks(range(len(longest)), [short(name, 30) for name, _ in longest], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    yield Picture("time", "time", f"The {len(longest)} longest steps" if len(longest) > 1 else "The step", _png(figure))
