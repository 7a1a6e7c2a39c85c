"""The tables of docs/plan.md from the dataclasses in plan/: keys, types, defaults, and the comment beside each field.

    python scripts/plan_reference.py          writes docs/plan.md
    python scripts/plan_reference.py --check  exit code 1 if it is not what the dataclasses say

A test checks it too, so that the page cannot go stale.
"""

import argparse
import ast
import inspect
import io
import sys
import tokenize
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from fairseq_quant_noise.plan import rules as source

PAGE = Path(__file__).resolve().parents[1] / "docs" / "plan.md"
MARK = "<!-- From here on written by scripts/plan_reference.py from the dataclasses in fairseq_quant_noise/plan. -->"
SECTIONS = (
    (
        source.NoiseRule,
        "`noise`: a list of rules",
        "Several rules on one weight act one after the other. `block_size` may be a mapping, as in stages.",
    ),
    (source.Schedule, "`schedule` of a noise rule", ""),
    (
        source.StageRule,
        "`stages`: a list of rules",
        "Stages run in the order of the list. `block_size` and `n_centroids` are a number, or a mapping from regular "
        "expressions over names, types (`Linear`, `LSTM`) or kernels (`conv3x3`, `conv1`) to numbers, the first that "
        "fits, with `default` for all other weights that `match` matches; `codebook` and `centroids` are a word, or a "
        "mapping to words. Either all stages "
        "give `updates`, or none does. A weight with fewer than 4 K blocks gets fewer centroids: the largest power of "
        "two that leaves four blocks each.",
    ),
    (source.Centroids, "`centroids`", ""),
    (
        source.Dense,
        "`dense`",
        "`dense: fp16` is short for `dense: {dtype: fp16}`. What it wins: [what stays dense](#what-stays-dense).",
    ),
    (source.Activations, "`activations`", "Without this section, inputs are not rounded; `{}` gives the defaults."),
    (source.Structure, "`structure`", "Noise and stages act on the layers that remain."),
    (
        source.Tuning,
        "`tuning`",
        "With `restart`, a stage has the learning rates of a run of its own, warm-up included: the scheduler counts "
        "updates and epochs from the stage's start. A length of the scheduler that is --max-update (a cosine's period, "
        "`total_num_update`) becomes the stage's length; other lengths are used as given, for each stage.",
    ),
    (
        source.Codes,
        "`codes`",
        "`codes: train` is short for `codes: {kind: train}`. What it costs and wins: [how it works](codes.md).",
    ),
    (
        source.Encode,
        "`encode`",
        "`encode: feedback` is short for `encode: {kind: feedback}`. What it costs and wins: "
        "[error feedback](#error-feedback).",
    ),
)
NAMES = {"start": "from"}  # fields whose key in YAML has another name


def comments(cls: type) -> dict[str, str]:
    """Field -> the comment beside it in the source."""
    text = inspect.getsource(cls)
    lines: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0]] = token.string.lstrip("# ")
    (tree,) = ast.parse(text).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own = [lines[n] for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in lines]
            found[node.target.id] = " ".join(own)
    return found


def default_of(field: Field) -> str:
    """As in YAML."""
    if field.default is MISSING:
        return "required" if field.default_factory is MISSING else ""
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return "none" if field.default is None else f"`{field.default}`"


def type_of(field: Field) -> str:
    """In words of YAML."""
    names: dict[Any, str] = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    known = {
        str | tuple[str, ...]: "text or list",
        source.Setting: "whole number or mapping",
        source.Setting | None: "whole number or mapping",
        source.Word: "text or mapping",
        source.Word | None: "text or mapping",
        int | None: "whole number",
        float | None: "number",
        int | str | None: "whole number or text",
        source.Schedule | None: "mapping",
        Any: "text, list or mapping",
    }
    return (names | known)[field.type]


def page() -> str:
    """The text of docs/plan.md: what stands above MARK stays."""
    parts = [PAGE.read_text(encoding="utf-8").partition(MARK)[0], MARK]
    for cls, title, note in SECTIONS:
        beside = comments(cls)
        rows = ["| key | type | default | |", "|---|---|---|---|"]
        for field in fields(cls):
            text = beside[field.name].replace("|", "\\|")
            key = NAMES.get(field.name, field.name)
            rows.append(f"| `{key}` | {type_of(field)} | {default_of(field)} | {text} |")
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        parts += [f"## {title}", f"{summary} {note}".strip(), "\n".join(rows)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"error: {PAGE.name} is out of date; run: python scripts/plan_reference.py")


if __name__ == "__main__":
    main()
