"""GLUE's MNLI as plain lines: from one .tsv the files OUT.input0 (premises), OUT.input1 (hypotheses) and OUT.label.

    python -m recipes.mnli.pairs MNLI/train.tsv OUT

Columns are found by their names in the first line: sentence1, sentence2 and gold_label.
"""

import sys
from pathlib import Path

LABELS = ("contradiction", "neutral", "entailment")  # in the order of the published roberta.large.mnli
COLUMNS = {"input0": "sentence1", "input1": "sentence2", "label": "gold_label"}


class BadTableError(Exception):
    """A file that is not MNLI's, in one line."""


def pairs(table: Path) -> list[tuple[str, str, str]]:
    """Premise, hypothesis and label of each row.

    Raises:
        BadTableError: a column is missing, a row is cut, or a label is none of LABELS.
    """
    rows = table.read_bytes().decode().split("\n")
    names = rows[0].rstrip("\r").split("\t")
    missing = [name for name in COLUMNS.values() if name not in names]
    if missing:
        raise BadTableError(f"{table}: has no column {missing[0]}; give the MNLI folder of GLUE")
    places = [names.index(name) for name in COLUMNS.values()]
    found = []
    for number, row in enumerate(rows[1:], 2):
        if not row.strip():
            continue
        cells = row.rstrip("\r").split("\t")
        if len(cells) != len(names):
            raise BadTableError(
                f"{table}, line {number}: {len(cells)} columns instead of {len(names)}; download it again"
            )
        premise, hypothesis, label = (cells[place].strip() for place in places)
        if label not in LABELS:
            raise BadTableError(f"{table}, line {number}: label {label!r} is none of {', '.join(LABELS)}")
        found.append((premise, hypothesis, label))
    return found


def main() -> None:
    """Write the three files of one table."""
    if len(sys.argv) != 3:
        sys.exit("error: give a table and an output prefix: python -m recipes.mnli.pairs MNLI/train.tsv OUT")
    table, out = map(Path, sys.argv[1:])
    try:
        found = pairs(table)
    except (BadTableError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for part, lines in zip(COLUMNS, zip(*found, strict=True), strict=True):
        out.with_name(f"{out.name}.{part}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{table}: {len(found):,} pairs")


if __name__ == "__main__":
    main()
