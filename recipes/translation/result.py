"""The result of one translation run: BLEU and bytes, from fairseq-generate's logs and the packed file.

    python -m recipes.translation.result RUN_DIR --noise 0.1 [--file ipq-alone]

reads RUN_DIR/eval-{dense,one-shot,FILE}.log and FILE.safetensors, prints the line and writes RUN_DIR/result.json
(RUN_DIR/FILE.json for another FILE than ipq).
"""

import re
import sys
from pathlib import Path
from typing import Any

from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.artifact.inspection import inspection
from recipes.results import print_result


def bleu(log: Path) -> tuple[str, float]:
    """The split that fairseq-generate translated, and sacrebleu's BLEU."""
    found = re.findall(r"Generate (\w+) with beam=\d+: BLEU\S* = ([\d.]+)", log.read_text(encoding="utf-8"))
    if not found:
        sys.exit(f"error: {log}: no BLEU in it; delete it and run the recipe again")
    return found[-1][0], float(found[-1][1])


def result(run: Path, noise: float, file: str) -> dict[str, Any]:
    """The figures of one run: BLEU of the dense, one-shot and fine-tuned networks, and bytes."""
    packed = inspection(run / f"{file}.safetensors", read(run / f"{file}.safetensors"))
    logs = {"dense": "dense", "one_shot": "one-shot", "ipq": file}
    return {
        "noise": noise,
        "split": bleu(run / "eval-dense.log")[0],
        **{f"bleu_{name}": bleu(run / f"eval-{log}.log")[1] for name, log in logs.items()},
        **{key: packed[key] for key in ("dense_bytes", "file_bytes", "paper_bytes", "ratio")},
    }


if __name__ == "__main__":
    print_result(__doc__, result)
