"""The tables of recipes/table2.sh: score and size as sharing, pruning, iPQ and noise come together, beside the paper's.

    python -m recipes.table2.table OUT_DIR [--method best]

prints them and writes OUT_DIR/table2.md and table2.jsonl (table2-best.md, …). A row is there once its run is.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_quant_noise.accounting import MIB
from fairseq_quant_noise.checkpoints.checkpoint import Checkpoint
from fairseq_quant_noise.quantization.table import model_bytes
from recipes.mnli.result import accuracies
from recipes.results import METHODS, perplexity
from recipes.table1.table import markdown

LM, MNLI = "language model, WikiText-2, PPL", "RoBERTa small, MNLI, accuracy in percent"
HEADER = ("", "score", "bytes", "ratio", "paper: MB", "paper: score")
NOTE = """\
Score: of the language model fairseq-eval-lm's perplexity, of RoBERTa fairseq-validate's accuracy on dev_matched; of
the packed file where there is one. Bytes: on disk, of a dense network 4 a number. Ratio: to the original network. The
paper's figures are of networks of 247 and 126 M parameters: compare the order of the lines, not the numbers. "r":
recalled, not looked up."""


@dataclass(frozen=True)
class Line:
    """A row: a run, dense or quantized, and the paper's figures for the language model and for RoBERTa."""

    row: str
    run: str  # its folder
    quantized: bool
    paper: dict[str, tuple[str, str]]  # by model: MB and score, "r" where recalled


LINES = (
    Line("original", "none", False, {LM: ("942", "18.3 r"), MNLI: ("480", "84.8")}),
    Line("+ sharing", "shared", False, {LM: ("510 r", "18.7 r"), MNLI: ("250 r", "84.0 r")}),
    Line("+ pruning", "shared-pruned", False, {LM: ("255 r", "22.5 r"), MNLI: ("125 r", "81.3 r")}),
    Line("iPQ", "none", True, {LM: ("38", "25.2"), MNLI: ("38", "82.5")}),
    Line("+ Quant-Noise", "noise", True, {LM: ("38", "20.7"), MNLI: ("38", "83.6")}),
    Line("+ sharing", "noise-shared", True, {LM: ("19 r", "22.0 r"), MNLI: ("14", "82.5")}),
    Line("+ pruning", "noise-shared-pruned", True, {LM: ("10", "24.7"), MNLI: ("8 r", "78.8 r")}),
    Line("  with larger blocks (x94 plan)", "noise-x94", True, {LM: ("", ""), MNLI: ("", "")}),
)


def dense_checkpoint(run: Path) -> Path:
    """The dense network of a run: the language model's is pruned after training, RoBERTa's before fine-tuning."""
    trained, pruned = run / "dense/checkpoint_best.pt", run / "pruned.pt"
    return trained if trained.exists() else pruned


def result(model: str, folder: Path, line: Line, best: str = "") -> dict[str, Any] | None:
    """The figures of a row, ours and the paper's; None while its run is not there."""
    run = folder / line.run
    file = run / f"{'model' if model == LM else 'ipq'}{best}.safetensors"
    packed = f"eval-{'packed' if model == LM else 'ipq'}{best}.log"
    log = run / (packed if line.quantized else "eval-dense.log")
    if not log.exists() or not (folder / "none/eval-dense.log").exists():
        return None
    original = dense_bytes(folder / "none")
    size = file.stat().st_size if line.quantized else dense_bytes(run)
    paper_mb, paper_score = line.paper[model]
    return {
        "model": model,
        "row": line.row,
        "run": line.run,
        "quantized": line.quantized,
        "score": perplexity(log) if model == LM else accuracies(log)["valid"],
        "bytes": size,
        "ratio": original / size,
        "paper_mb": paper_mb,
        "paper_score": paper_score,
    }


def dense_bytes(run: Path) -> int:
    """4 bytes a number of the dense network of a run, shared layers once."""
    return model_bytes(Checkpoint(dense_checkpoint(run)).network)[1]


def cells(record: dict[str, Any]) -> tuple[str, ...]:
    """A row under HEADER."""
    score = f"{record['score']:.2f}" if record["model"] == LM else f"{record['score']:.1f}"
    size = f"{record['bytes']:,} ({record['bytes'] / MIB:.2f} MiB)"
    return record["row"], score, size, f"x{record['ratio']:.1f}", record["paper_mb"], record["paper_score"]


def main() -> None:
    """Print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=METHODS, default="paper")
    args = parser.parse_args()
    out, best = args.out, METHODS[args.method]
    parts, records = [], []
    for model, folder in ((LM, out / "lm"), (MNLI, out)):
        found = [record for line in LINES if (record := result(model, folder, line, best)) is not None]
        records += found
        if found:
            parts.append("\n".join([f"## {model}", "", *markdown(HEADER, [cells(record) for record in found])]))
    text = "\n\n".join([*parts, NOTE])
    (out / f"table2{best}.md").write_text(text + "\n", encoding="utf-8")
    (out / f"table2{best}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    print(f"\n{text}\n\nas JSON lines: {out / f'table2{best}.jsonl'}")


if __name__ == "__main__":
    main()
