"""tests/scripts/reported.py: what it runs is what docs/upstream.md lists, and what is wrong is called so."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "scripts"))

import reported  # noqa: E402
from reported_rows import ROWS, Row  # noqa: E402


def test_the_page_has_a_row_for_each_command():
    page = reported.PAGE.read_text()
    table = page[page.index(reported.BEGIN) : page.index(reported.END)]
    listed = [tuple(line.split(" | ")[:2]) for line in table.splitlines() if " | `" in line]
    assert listed == [(f"| {case}", f"`{reported.cell(row.command)}`") for case, rows in ROWS.items() for row in rows]


@pytest.mark.parametrize(
    ("row", "code", "output", "right"),
    [
        (Row("x", "done", 0), 0, "begun\ndone", True),
        (Row("x", "done", 0), 0, "begun", False),
        (Row("x", "done", 0), 1, "done", False),
        (Row("x", "error: .*name", (2, 3)), 3, "error: a name", True),
        (Row("x", "error: .*name", (2, 3)), 2, "Traceback\nerror: a name", False),
    ],
)
def test_a_row_is_right_by_exit_code_and_output(row, code, output, right):
    assert reported.Outcome(row, code, output).right == right


def test_rows_run_and_are_as_they_must_be(tmp_path):
    bench = reported.Bench(tmp_path)
    for row in ROWS["restore_missing"]:
        outcome = bench.run(row)
        assert outcome.right, outcome.output
        assert outcome.last_line.startswith("error: ")
        assert str(tmp_path) not in reported.table({"restore_missing": [outcome]})
