"""The plans and the table of recipes/codes.sh.

python -m recipes.codes.table OUT --plans           writes OUT/plans
python -m recipes.codes.table OUT                   writes OUT/codes.jsonl from the logs, and prints the table
python -m recipes.codes.table docs/codes.jsonl      prints the table of these lines
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from fairseq_quant_noise.accounting import MIB
from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.artifact.inspection import inspection
from recipes.results import json_lines, perplexity
from recipes.table1.plans import LAYERS, shipped
from recipes.table1.table import markdown

WEIGHTS = (LAYERS + "fc[12]", r"decoder\.embed_tokens", LAYERS + r"self_attn\.(q|k|v|out)_proj")
RUNS = {  # in the order of the table
    "paper": "iPQ as in the paper: three stages, fixed codes",
    "noise": "the same, after training with Quant-Noise (p .05)",
    "fixed": "all at once, fixed codes, otherwise as ours",
    "best": "**ours**: all at once, codes that train",
    "budget-best": "**ours**, with the plan that `plan --budget` finds",
    "noise-best": "ours, after training with Quant-Noise",
    "k64": "K 64, as in the paper",
    "k64-best": "K 64, ours",
    "d16": "blocks of 16 (attention 8), as in the paper",
    "d16-best": "blocks of 16, ours",
    "pruned": "shared in pairs, pruned by half, as in the paper",
    "pruned-best": "shared in pairs, pruned by half, ours",
    "int4": "int4, a range a channel",
    "int4-learned": "int4, learned scales",
    "int2": "int2, a range a channel",
    "int2-learned": "int2, learned scales",
}
HEADER = ("", "PPL by seed", "mean", "mean dense PPL", "MiB", "ratio")


def plans() -> dict[str, dict[str, Any]]:
    """Name -> plan."""
    small = shipped("small")
    wide = [stage | {"block_size": 2 * stage["block_size"]} for stage in small["stages"]]
    found = {
        "small": small,
        "k64": small | {"stages": [stage | {"n_centroids": 64} for stage in small["stages"]]},
        "d16": small | {"stages": wide},
    }
    for bits in (4, 2):
        for name, by in ((f"int{bits}", "channel"), (f"int{bits}-learned", "learned-channel")):
            found[name] = {"stages": [{"match": w, "scheme": f"int{bits}", "range": by} for w in WEIGHTS]}
    return found


def lines_of(out: Path) -> list[dict[str, Any]]:
    """A line for each run that is done."""
    found = []
    for folder in sorted(out.glob("seed-*")):
        for run in RUNS:
            log, file = folder / f"eval-{run}.log", folder / f"{run}.safetensors"
            dense = folder / next((network for network in ("noise", "pruned") if run.startswith(network)), "none")
            if log.exists() and file.exists():
                line = {"run": run, "seed": int(folder.name.removeprefix("seed-")), "ppl": round(perplexity(log), 2)}
                line |= {"dense_ppl": round(perplexity(dense / "eval-dense.log"), 2)}
                info = inspection(file, read(file))
                line |= {key: info[key] for key in ("dense_bytes", "file_bytes")}
                found.append(line)
    return found


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row for each run, its perplexity by seed and on average."""
    rows = []
    for run, text in RUNS.items():
        of = sorted((line for line in lines if line["run"] == run), key=lambda line: line["seed"])
        if of:
            size = mean(line["file_bytes"] for line in of)
            ppls, dense = [line["ppl"] for line in of], mean(line["dense_ppl"] for line in of)
            by_seed = ", ".join(f"{line['seed']}: {line['ppl']:.1f}" for line in of)
            sizes = (f"{size / MIB:.3f}", f"x{mean(line['dense_bytes'] for line in of) / size:.1f}")
            rows.append((text, by_seed, f"{mean(ppls):.1f}", f"{dense:.1f}", *sizes))
    return "\n".join(markdown(HEADER, rows))


def main() -> None:
    """Write the plans, or the lines and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--plans", action="store_true")
    args = parser.parse_args()
    if args.plans:
        for name, plan in plans().items():
            (args.path / "plans" / f"{name}.yaml").write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")
        return
    if args.path.is_dir():
        lines = lines_of(args.path)
        (args.path / "codes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    else:
        lines = json_lines(args.path)
    print(table(lines))


if __name__ == "__main__":
    main()
