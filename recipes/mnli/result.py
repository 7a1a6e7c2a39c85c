"""The result of one MNLI run: accuracies and bytes, from fairseq-validate's logs and the packed file.

    python -m recipes.mnli.result RUN_DIR --noise 0.1 [--file ipq-alone]

reads RUN_DIR/eval-{dense,one-shot,FILE}.log and FILE.safetensors, prints the line and writes RUN_DIR/result.json
(RUN_DIR/FILE.json for another FILE than ipq). Accuracy is in percent, with one decimal as fairseq rounds it.
"""

import re
import sys
from pathlib import Path
from typing import Any

from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.artifact.inspection import inspection
from recipes.results import print_result


def accuracies(log: Path) -> dict[str, float]:
    """Split -> the accuracy that fairseq-validate reports."""
    found = re.findall(r"valid on '(\w+)' subset \|.*?\baccuracy ([\d.]+)", log.read_text())
    if not found:
        sys.exit(f"error: {log}: no accuracy in it; delete it and run the recipe again")
    return {split: float(value) for split, value in found}


def result(run: Path, noise: float, file: str) -> dict[str, Any]:
    """The figures of one run: accuracy of the dense, one-shot and fine-tuned networks by split, and bytes."""
    packed = inspection(run / f"{file}.safetensors", read(run / f"{file}.safetensors"))
    return {
        "noise": noise,
        "accuracy_dense": accuracies(run / "eval-dense.log"),
        "accuracy_one_shot": accuracies(run / "eval-one-shot.log"),
        "accuracy_ipq": accuracies(run / f"eval-{file}.log"),
        **{key: packed[key] for key in ("dense_bytes", "file_bytes", "paper_bytes", "ratio")},
    }


if __name__ == "__main__":
    print_result(__doc__, result)
