"""The result of one run: perplexities and bytes, from fairseq-eval-lm's logs and the packed file.

    python recipes/results.py RUN_DIR --noise 0.05 [--method best]

reads RUN_DIR/eval-{dense,one-shot,packed}.log and model.safetensors, prints the line and writes RUN_DIR/result.json.
With `--method best` they are eval-packed-best.log, model-best.safetensors and result-best.json.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.artifact.inspection import inspection

#: What is added to a file's name for each METHOD of a recipe (recipes/lib.sh).
METHODS = {"paper": "", "best": "-best"}


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def perplexity(log: Path) -> float:
    """The perplexity that fairseq-eval-lm reports, from its loss in bits, which has more digits."""
    found = re.findall(r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)", log.read_text())
    if not found:
        sys.exit(f"error: {log}: no perplexity in it; delete it and run the recipe again")
    return float(found[-1][1])


def result(run: Path, noise: float, best: str = "") -> dict[str, Any]:
    """The figures of one run: PPL of the dense, one-shot and fine-tuned models, bytes of the file and of the paper."""
    packed = inspection(run / f"model{best}.safetensors", read(run / f"model{best}.safetensors"))
    return {
        "noise": noise,
        "ppl_dense": perplexity(run / "eval-dense.log"),
        "ppl_one_shot": perplexity(run / "eval-one-shot.log"),
        "ppl_ipq": perplexity(run / f"eval-packed{best}.log"),
        **{key: packed[key] for key in ("dense_bytes", "file_bytes", "paper_bytes", "ratio")},
    }


def print_result(doc: str | None, result: Callable[[Path, float, str], dict[str, Any]]) -> None:
    """The program of a recipe's result: `result` of a run, its noise and a packed file, printed and written as JSON."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--noise", type=float, required=True)
    parser.add_argument("--file", default="ipq")
    args = parser.parse_args()
    line = json.dumps(result(args.run, args.noise, args.file))
    (args.run / ("result.json" if args.file == "ipq" else f"{args.file}.json")).write_text(line + "\n")
    print(line)


def main() -> None:
    """Print and write the result of one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--noise", type=float, required=True)
    parser.add_argument("--method", choices=METHODS, default="paper")
    args = parser.parse_args()
    best = METHODS[args.method]
    line = json.dumps(result(args.run, args.noise, best))
    (args.run / f"result{best}.json").write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
