"""The paper's sizes, for real: its networks with random weights, quantized and on disk, beside what `plan` says.

    python benchmarks/sizes.py OUT_DIR [--only wikitext103] [--json]

A row a file: the paper's figure, the size by `plan` (the paper's accounting) and on disk, and the seconds of
`fairseq-quant-noise quantize`, from checkpoint to file. Random weights, for sizes do not depend on them. Needs 3 GB of
memory and 2 GB of disk; two and a half minutes on two cores for the four language models.
"""

import argparse
import contextlib
import io
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fairseq_quant_noise.accounting import MIB
from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.artifact.inspection import inspection
from fairseq_quant_noise.cli.main import main as verb
from fairseq_quant_noise.cli.printing import format_rows
from fairseq_quant_noise.networks.registry import build

PLANS = Path(__file__).parents[1] / "configs/plans"
HALVES = {"share_layers": 2, "keep_layers": "every-other"}


@dataclass(frozen=True)
class Case:
    """A network, what is done to it, and the paper's figure."""

    name: str
    arch: str
    vocab_size: int
    plan: str
    paper_mb: float
    structure: dict[str, Any] | None = None  # added to the plan
    settings: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


LM = ("quant_noise_transformer_lm_wikitext103", 267_744)
ROBERTA = ("quant_noise_roberta_base", 50_265)
CASES = (
    Case("wikitext103", *LM, "wikitext103", 38),
    Case("wikitext103, shared", *LM, "wikitext103", 19, {"share_layers": 2}),
    Case("wikitext103, shared and pruned", *LM, "wikitext103", 10, HALVES),
    Case("wikitext103, x94 plan", *LM, "wikitext103_x94", 10),
    Case("roberta_base", *ROBERTA, "roberta", 38, None, ("quant_noise_embedding_layer=true",), ("mnli=3",)),
    Case("roberta_base, shared", *ROBERTA, "roberta", 14, {"share_layers": 2}, (), ("mnli=3",)),
)


def checkpoint(case: Case, folder: Path) -> Path:
    """A checkpoint of the case's network with random weights, as fairseq-train writes it; made once."""
    from fairseq_quant_noise.plugin.models.architectures import architecture_options

    path = folder / ("-".join((case.arch, *case.settings)).replace("=", "-") + ".pt")
    if not path.exists():
        torch.manual_seed(0)
        options = architecture_options(case.arch, case.settings, case.heads)
        model = build(case.arch, options, case.vocab_size)
        options.pop("classification_heads", None)
        part = path.with_suffix(".part")
        torch.save({"model": model.state_dict(), "cfg": {"model": options, "task": {}, "criterion": {}}}, part)
        part.replace(path)
    return path


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """The row of a case."""
    path = checkpoint(case, folder)
    content = yaml.safe_load((PLANS / f"{case.plan}.yaml").read_text(encoding="utf-8"))
    plan, out = folder / "plan.yaml", folder / (case.name.replace(", ", "-").replace(" ", "-") + ".safetensors")
    plan.write_text(yaml.safe_dump(content | ({"structure": case.structure} if case.structure else {})))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        verb(["plan", "--path", str(path), "--plan", str(plan), "--json"])
    planned = json.loads(printed.getvalue())
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        verb(["quantize", "--path", str(path), "--plan", str(plan), "--out", str(out)])
    seconds = time.perf_counter() - began
    info = inspection(out, read(out))
    return {
        "name": case.name,
        "paper_mb": case.paper_mb,
        "dense_mib": planned["dense_bytes"] / MIB,
        "plan_mib": planned["paper_bytes"] / MIB,
        "file_mib": info["file_bytes"] / MIB,
        "file_bytes": info["file_bytes"],
        "ratio": planned["original_bytes"] / info["file_bytes"],  # of the network before sharing and pruning
        "seconds": seconds,
    }


def main() -> None:
    """Make the files and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in CASES:
        if case.name.startswith(args.only):
            print(f"{case.name} ...", file=sys.stderr, flush=True)
            rows.append(measure(case, args.out))
    if args.json:
        print(json.dumps(rows))
        return
    header = ("network", "paper MB", "dense MiB", "plan MiB", "file MiB", "file bytes", "ratio", "seconds")
    cells = [
        (
            *(r["name"], f"{r['paper_mb']:.0f}", f"{r['dense_mib']:.2f}", f"{r['plan_mib']:.2f}"),
            *(f"{r['file_mib']:.2f}", f"{r['file_bytes']:,}", f"x{r['ratio']:.1f}", f"{r['seconds']:.0f}"),
        )
        for r in rows
    ]
    print(format_rows(header, cells))


if __name__ == "__main__":
    main()
