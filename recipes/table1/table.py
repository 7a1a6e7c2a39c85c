"""The tables of recipes/table1.sh: our test perplexity beside the paper's.

    python -m recipes.table1.table runs/table1              all tables; writes table.md and table.jsonl there
    python -m recipes.table1.table runs/table1 --run none   only the lines of one run
    python -m recipes.table1.table runs/table1 --method best   with the files of METHOD=best; writes table-best.md, …

A line is there once its run is: it needs RUN/eval-dense.log, RUN/eval-FILE.log and RUN/FILE.safetensors.
"""

import argparse
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.artifact.inspection import inspection
from recipes.results import METHODS, perplexity

TABLE1, CHANNEL, EXACT = "table 1", "ranges per channel", "exact or proxy noise"
HEADERS = {
    TABLE1: ("training", "scheme", "PPL", "dense PPL", "file bytes", "paper's bytes", "ratio", "paper: PPL"),
    CHANNEL: ("training", "scheme", "PPL", "dense PPL", "file bytes", "paper's bytes", "ratio", "paper: PPL"),
    EXACT: ("noise", "scheme", "full PPL", "quantized PPL", "paper: full", "paper: quantized"),
}
NOTE = """\
PPL: test perplexity by fairseq-eval-lm of the packed file; dense PPL (full PPL): of the same network before it was
quantized. Paper's bytes: by its accounting, without a file's header. Ratio: dense bytes over file bytes. In the
uncompressed line a weight is 4 bytes.

Columns "paper" are of WikiText-103 and a network of 247 M parameters: compare the order of the lines, not the numbers.
"r" marks numbers that are recalled, not looked up in the paper: check them there before you cite them."""


@dataclass(frozen=True)
class Line:
    """A line of a table: a network and how it was quantized."""

    table: str
    row: str  # the noise of the training
    scheme: str
    run: str  # the folder of the run
    file: str  # RUN/FILE.safetensors
    paper: float | None = None  # the paper's PPL of the quantized network
    paper_full: float | None = None  # and of the network before, in the last table
    recalled: bool = True  # both from memory


#: The whole uncompressed network; its bytes are those that any packed file of it gives as dense.
UNCOMPRESSED = Line(TABLE1, "none", "uncompressed", "none", "int4", 18.3)
LINES = (
    UNCOMPRESSED,
    Line(TABLE1, "none", "int4", "none", "int4", 39.4),
    Line(TABLE1, "QAT", "int4", "int4-qat", "int4", 34.1),
    Line(TABLE1, "Quant-Noise", "int4", "int4-qn", "int4", 21.8),
    Line(TABLE1, "none", "int8", "none", "int8", 19.6),
    Line(TABLE1, "QAT", "int8", "int8-qat", "int8", 21.0),
    Line(TABLE1, "Quant-Noise", "int8", "int8-qn", "int8", 18.7),
    Line(TABLE1, "none", "iPQ", "none", "ipq", 25.2, recalled=False),
    Line(TABLE1, "QAT", "iPQ", "pq-qat", "ipq", 41.2, recalled=False),
    Line(TABLE1, "Quant-Noise", "iPQ", "proxy", "ipq", 20.7, recalled=False),
    Line(TABLE1, "none", "iPQ + int8", "none", "ipq-int8"),
    Line(TABLE1, "Quant-Noise", "iPQ + int8", "proxy", "ipq-int8", 21.1, recalled=False),
    Line(CHANNEL, "none", "int4 per channel", "none", "int4-channel", 21.2),
    Line(CHANNEL, "Quant-Noise", "int4 per channel", "int4-channel-qn", "int4-channel", 19.5),
    Line(CHANNEL, "none", "int8 per channel", "none", "int8-channel", 18.5),
    Line(CHANNEL, "Quant-Noise", "int8 per channel", "int8-channel-qn", "int8-channel", 18.3),
    Line(EXACT, "pq, subvectors", "iPQ", "pq", "ipq", 21.1, 18.3),
    Line(EXACT, "pq, clusters", "iPQ", "pq-clusters", "ipq", 21.2, 18.3),
    Line(EXACT, "proxy, subvectors", "iPQ", "proxy", "ipq", 21.0, 18.3),
    Line(EXACT, "proxy, clusters", "iPQ", "proxy-clusters", "ipq", 21.1, 18.4),
)


@cache
def sizes(path: Path) -> dict[str, Any]:
    """What `inspect` says of a packed file."""
    return inspection(path, read(path))


def result(out: Path, line: Line, best: str = "") -> dict[str, Any] | None:
    """The figures of a line, ours and the paper's; None while one of its files is missing."""
    run, name = out / line.run, line.file + (best if line.file.startswith("ipq") else "")
    dense, packed, file = run / "eval-dense.log", run / f"eval-{name}.log", run / f"{name}.safetensors"
    if not all(path.exists() for path in (dense, packed, file)):
        return None
    info = sizes(file)
    bytes_ = {key: info[key] for key in ("file_bytes", "paper_bytes", "ratio")}
    if line is UNCOMPRESSED:
        packed, bytes_ = dense, {"file_bytes": info["dense_bytes"], "paper_bytes": info["dense_bytes"], "ratio": 1.0}
    return {
        "table": line.table,
        "row": line.row,
        "scheme": line.scheme,
        "run": line.run,
        "ppl": perplexity(packed),
        "dense_ppl": perplexity(dense),
        **bytes_,
        "paper_ppl": line.paper,
        "paper_dense_ppl": line.paper_full,
        "paper_is_recalled": line.recalled,
    }


def cells(record: dict[str, Any]) -> tuple[str, ...]:
    """A line under its table's header."""

    def paper(key: str) -> str:
        value = record[key]
        return "" if value is None else f"{value:.1f}{' r' if record['paper_is_recalled'] else ''}"

    ppl, dense = f"{record['ppl']:.2f}", f"{record['dense_ppl']:.2f}"
    if record["table"] == EXACT:
        return record["row"], record["scheme"], dense, ppl, paper("paper_dense_ppl"), paper("paper_ppl")
    bytes_ = (f"{record['file_bytes']:,}", f"{record['paper_bytes']:,.0f}", f"x{record['ratio']:.2f}")
    return record["row"], record["scheme"], ppl, dense, *bytes_, paper("paper_ppl")


def markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Header, rule and rows, with columns as wide as their widest entry."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return [f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines]


def tables(records: list[dict[str, Any]]) -> str:
    """The tables that have a line, and what they mean."""
    parts = []
    for table, header in HEADERS.items():
        if rows := [cells(record) for record in records if record["table"] == table]:
            parts.append("\n".join([f"## {table.capitalize()}", "", *markdown(header, rows)]))
    return "\n\n".join([*parts, NOTE])


def summary(record: dict[str, Any]) -> str:
    """A line by itself, while the recipe runs."""
    named = zip(HEADERS[record["table"]][2:], cells(record)[2:], strict=True)
    return f"{record['row']}, {record['scheme']}: {'; '.join(f'{k} {v}' for k, v in named if v)}"


def main() -> None:
    """Print the lines of a run, or print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--run", choices=sorted({line.run for line in LINES}))
    parser.add_argument("--method", choices=METHODS, default="paper")
    args = parser.parse_args()
    out, best = args.out, METHODS[args.method]
    lines = [line for line in LINES if args.run in (None, line.run)]
    found = [record for line in lines if (record := result(out, line, best)) is not None]
    if args.run is not None:
        print("\n".join(summary(record) for record in found))
        return
    text = tables(found)
    (out / f"table{best}.md").write_text(text + "\n", encoding="utf-8")
    (out / f"table{best}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found), encoding="utf-8")
    print(f"\n{text}\n\ntable: {out / f'table{best}.md'}\nas JSON lines: {out / f'table{best}.jsonl'}")
    if len(found) < len(lines):
        print(f"{len(lines) - len(found)} of {len(lines)} lines are not there yet: their runs were not done")


if __name__ == "__main__":
    main()
