"""Write the page: one HTML file that needs no network and no script. All text that comes from files is escaped."""

import base64
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from .paper import POINTS, TITLES
from .pictures import MOST, Picture, groups, metric_of, staged, times
from .runs import Runs
from .scores import METRICS, pareto

SECTIONS = {
    "score": "Score against size",
    "stages": "Score over the stages",
    "codes": "Codes that train",
    "distortion": "Distortion by layer",
    "codebooks": "Codebook use and code entropy",
    "time": "Time by step",
    "commands": "Commands",
    "missing": "What is not here",
}
_TEXT = {
    "score": "A point is a network, dense or as a packed file: its bytes on disk (dense: 4 a number), and its score "
    "on the test data as fairseq's programs report it. On the Pareto front nothing is both smaller and better. The "
    "paper's networks are larger and its data are others: compare the order of its points with ours, not the numbers.",
    "stages": "The validations while iPQ quantizes one group of weights after the other and fine-tunes the centroids.",
    "codes": "Runs with `codes: train`: how many codes each encoding changes, a mean over the updates since the last "
    "line of the log, and how far the network's weights are from the latent ones that their codes stand for.",
    "distortion": "||W - Ŵ|| / ||W|| of each weight at the moment it was quantized, before any fine-tuning; and, "
    "where a training logs it, of weights and outputs under its noise.",
    "codebooks": "Read from the codes in the packed files. Used: centroids that at least one code names. Entropy: "
    "bits a code by how often each centroid occurs; log2 K (dashed) is reached when all occur alike. Of intN, the "
    "levels are counted as centroids.",
    "time": "Seconds of each step of a recipe; of a step that was killed and done again, the last attempt.",
    "commands": "The commands that made the runs. A step's own command may be a function of its recipe.",
    "missing": "Parts of a run that this page would have shown.",
}
_OPEN = 4  # pictures of a section that are seen at once
Cell = str | float | int | None
Rows = Sequence[Sequence[Cell]]


def page(runs: Runs, drawn: Sequence[Picture]) -> str:
    """Make the HTML text of the report."""
    tables = {
        "score": _score_tables(runs),
        "stages": _stage_tables(runs),
        "codes": _codes_table(runs),
        "distortion": _distortion_tables(runs),
        "codebooks": _codebook_tables(runs),
        "time": _time_table(runs),
        "commands": _commands(runs),
        "missing": [f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in runs.notes)}</ul>"] if runs.notes else [],
    }
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title in SECTIONS.items())
    sections = "".join(_section(key, [p for p in drawn if p.section == key], tables[key]) for key in SECTIONS)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    of = f"{len(runs.names)} runs" if len(runs.names) != 1 else "1 run"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Quant-Noise: {of}</title><style>{style}</style></head><body><main>"
        f"<h1>Quant-Noise report: {of}</h1>"
        f'<p class="soft">{escape(", ".join(runs.folders))}<br>made {made}</p><nav>{links}</nav>'
        f"{sections}</main></body></html>\n"
    )


def _section(key: str, drawn: Sequence[Picture], tables: Sequence[str]) -> str:
    content = _figures(drawn[:_OPEN])
    if drawn[_OPEN:]:
        cut = f" (no more than {MOST} are drawn; the tables have all)" if len(drawn) == MOST else ""
        content += _folded(f"{len(drawn) - _OPEN} more pictures{cut}", _figures(drawn[_OPEN:]))
    content += "".join(tables)
    if not content:
        content = f"<p><em>{'Nothing is missing.' if key == 'missing' else 'The runs have nothing for this.'}</em></p>"
    return f'<section id="{key}"><h2>{SECTIONS[key]}</h2><p class="soft">{_TEXT[key]}</p>{content}</section>'


def _figures(drawn: Sequence[Picture]) -> str:
    return f'<div class="figures">{"".join(_figure(picture) for picture in drawn)}</div>' if drawn else ""


def _figure(picture: Picture) -> str:
    content = base64.b64encode(picture.png).decode()
    title = escape(picture.title)
    return f'<figure><figcaption>{title}</figcaption><img alt="{title}" src="data:image/png;base64,{content}"></figure>'


def table(
    header: Sequence[str], rows: Rows, caption: str = "", best: Iterable[int] = (), text: Iterable[int] = ()
) -> str:
    """Make an HTML table, with everything in it escaped.

    Args:
        header: of the columns; numbers in them are set to the right.
        rows: cells; a float has its digits cut to what is worth reading.
        caption: above it.
        best: rows in bold.
        text: columns whose text may be broken into lines.
    """
    best, text = set(best), set(text)
    numeric = [any(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]
    kinds = ["n" if numeric[i] else "text" if i in text else "" for i in range(len(header))]
    head = "".join(f"<th{_class(k if k == 'n' else '')}>{escape(h)}</th>" for k, h in zip(kinds, header, strict=True))
    body = "".join(
        f"<tr{_class('best' if n in best else '')}>"
        + "".join(f"<td{_class(k)}>{_cell(c)}</td>" for k, c in zip(kinds, row, strict=True))
        + "</tr>"
        for n, row in enumerate(rows)
    )
    title = f'<p class="soft">{escape(caption)}</p>' if caption else ""
    return f'{title}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _cell(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 1 else f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else escape(value)


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _score_tables(runs: Runs) -> list[str]:
    tables = []
    for (metric, data), points in groups(runs.points).items():
        front = pareto(points)
        points = sorted(points, key=lambda p: (-p.bytes, p.run))
        dense = {p.run: p.bytes for p in points if p.label == "dense"}
        rows = [
            (p.run, p.label, p.score, p.mib, f"{p.bytes:,.0f}", _ratio(dense.get(p.run), p.bytes), p.source)
            for p in points
        ]
        best = [i for i, p in enumerate(points) if p in front]
        header = ("run", "network", METRICS[metric], "MiB", "bytes", "ratio", "from")
        tables.append(table(header, rows, f"Evaluated on {data}. Bold: on the Pareto front.", best))
    for metric in dict.fromkeys(p.metric for p in runs.points):
        if metric in POINTS:
            paper = [(p.name, p.score, p.megabytes, "recalled" if p.recalled else "seen") for p in POINTS[metric]]
            tables.append(_folded(f"The paper's points: {TITLES[metric]}", table(("", "score", "MB", ""), paper)))
    return tables


def _ratio(dense: float | None, size: float) -> str:
    return f"x{dense / size:.2f}" if dense else ""


def _stage_tables(runs: Runs) -> list[str]:
    tables = []
    for run, log in staged(runs):
        metric = metric_of(log)
        if metric is None:
            continue
        rows = [
            (v.update, v.stage, v.subset, v.values[metric], v.values.get("ipq_mib"))
            for v in log.validations
            if metric in v.values
        ]
        rules = "; ".join(f"{n}: from update {at:,}, {rule}" for n, (at, rule) in log.stages.items())
        undone = (
            f" Of {log.n_stages} stages {max(log.stages)} are in the log." if max(log.stages) < log.n_stages else ""
        )
        header = ("update", "stage", "split", METRICS.get(metric, metric), "MiB, paper's accounting")
        tables.append(_folded(f"{run}: {log.path.name}", table(header, rows, f"Stages: {rules}.{undone}")))
    return tables


def _codes_table(runs: Runs) -> list[str]:
    rows = []
    for run, log in runs.logs:
        changed, error = log.codes_changed, log.latent_error
        if changed:
            ends = (changed[0][1], changed[-1][1], *((error[0][1], error[-1][1]) if error else (None, None)))
            rows.append((f"{run}: {log.path.name}", changed[0][0], changed[-1][0], *ends))
    header = ("run", "first line, update", "last", "changed, %, first", "last", "relative error, first", "last")
    return [table(header, rows)] if rows else []


def _distortion_tables(runs: Runs) -> list[str]:
    tables = []
    for run, log in runs.logs:
        name = f"{run}: {log.path.name}"
        if log.encoded:
            rows = [(e.tensor, e.stage, e.how, e.error) for e in log.encoded.values()]
            tables.append(_folded(f"{name}, as quantized", table(("tensor", "stage", "how", "relative error"), rows)))
        if log.distortion:
            noise = [(kind, part, len(s), s[0][1], s[-1][1]) for (kind, part), s in log.distortion.items()]
            header = ("kind of layer", "of", "measured", "first", "last")
            tables.append(_folded(f"{name}, under the noise", table(header, noise)))
    return tables


def _codebook_tables(runs: Runs) -> list[str]:
    tables = []
    for file in runs.files:
        rows = [(u.tensor, u.scheme, u.codes, f"{u.used} / {u.centroids}", u.entropy, u.capacity) for u in file.use]
        if rows:
            header = ("tensor", "scheme", "codes", "used", "entropy, bits", "log2 K")
            tables.append(_folded(f"{file.run}: {file.name}", table(header, rows)))
    return tables


def _time_table(runs: Runs) -> list[str]:
    rows = [(name, round(seconds)) for name, seconds in times(runs)]
    return [_folded(f"All {len(rows)} steps", table(("step", "seconds"), rows))] if rows else []


def _commands(runs: Runs) -> list[str]:
    recipes = list(dict.fromkeys(step.recipe for step in runs.steps if step.recipe))
    parts = [f"<pre>{escape(chr(10).join(recipes))}</pre>"] if recipes else []
    rows = [(step.run, step.name, step.command) for step in runs.steps if step.command]
    if rows:
        parts.append(_folded("Every step", table(("run", "step", "command"), rows, text=(2,))))
    return parts
