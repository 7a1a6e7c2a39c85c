"""Measure how a centroid's gradient should be scaled: the sum over its n blocks, their mean, or sum / sqrt(n) ("root").

    bash recipes/quickstart/prepare.sh OUT
    python -m recipes.centroid_gradient run OUT [--part 1/2]      a second process takes --part 2/2
    python -m recipes.centroid_gradient table docs/centroid_gradient.jsonl

A language model (2 layers, d 128, ffn 1024) is trained on the quickstart's corpus without noise, then quantized in the
paper's three stages at several sizes of cluster, and tuned for 300 updates with each scale, optimizer and rate. A run
that is in OUT/runs.jsonl is not done again; it takes a minute and a quarter on an idle core. `nag` is fairseq's
published command: momentum .99, --clip-norm 0.1, a cosine so long that the rate hardly falls.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from recipes import grid
from recipes.table1.table import markdown

UPDATES, DENSE_UPDATES = 300, 1500
POWERS = {"sum": 0.0, "root": 0.5, "mean": 1.0}  # of the cluster's size
#: By the blocks of a centroid, roughly: d of feed-forward and embedding, d of attention, K, codebooks shared.
PLANS = {"10": (16, 8, 256, False), "2000": (8, 4, 32, True), "8000": (8, 4, 8, True)}
HEADER = ("blocks a centroid", "optimizer", "schedule", "scale", "validation PPL by peak rate")

NAG = ["--optimizer", "nag", "--momentum", "0.99", "--clip-norm", "0.1"]
ADAM = ["--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--clip-norm", "1.0"]


@dataclass(frozen=True)
class Setting:
    """One training."""

    clusters: str  # of PLANS
    optimizer: str  # nag, adam
    lr: float  # at its peak
    scale: str  # of POWERS
    schedule: str = "constant"  # nearly; or cosine, to 0; restart: to 0 in each stage
    updates: int = UPDATES
    seed: int = 1


def settings() -> Iterator[Setting]:
    """The grid, what matters most first."""
    rates = {"mean": (0.05, 0.5, 5.0), "root": (0.05, 0.5), "sum": (0.05, 0.5, 0.005)}
    for clusters in PLANS:
        for scale, lrs in rates.items():
            for lr in lrs:
                yield Setting(clusters, "nag", lr, scale)
    for clusters in ("2000", "10"):
        for lr in (1e-3, 3e-4, 3e-3):
            yield Setting(clusters, "adam", lr, "root")
        for scale in ("sum", "mean"):
            yield Setting(clusters, "adam", 1e-3, scale)
        for schedule in ("restart", "cosine"):
            yield Setting(clusters, "nag", 0.05, "root", schedule)
            yield Setting(clusters, "adam", 1e-3, "root", schedule)


def plan_of(name: str) -> dict[str, Any]:
    """The plan of PLANS."""
    wide, narrow, k, shared = PLANS[name]
    more = {"n_centroids": k, **({"codebook": "shared"} if shared else {})}
    return {
        "stages": [
            {"match": r"decoder\.layers\.\d+\.fc[12]", "block_size": wide, **more},
            {"match": r"decoder\.embed_tokens", "block_size": wide, "n_centroids": k},
            {"match": r"decoder\.layers\.\d+\.self_attn\.(q|k|v|out)_proj", "block_size": narrow, **more},
        ]
    }


def common(out: Path, updates: int, seed: int) -> list[str]:
    """Flags of every training."""
    return (
        f"{out}/data-bin --user-dir fairseq_quant_noise --task language_modeling --cpu --num-workers 0"
        " --arch quant_noise_transformer_lm_small --decoder-layers 2 --decoder-ffn-embed-dim 1024"
        " --tokens-per-sample 128 --max-tokens 512 --required-batch-size-multiple 1"
        f" --no-progress-bar --log-format json --seed {seed} --max-update {updates}"
        f" --validate-interval 10000 --validate-interval-updates {updates} --no-epoch-checkpoints"
    ).split()


def dense(out: Path) -> None:
    """The dense network, trained once."""
    if (out / "dense" / "checkpoint_last.pt").exists():
        return
    schedule = f"--lr 2e-3 --lr-scheduler cosine --warmup-updates 150 --lr-period-updates {DENSE_UPDATES - 150}"
    flags = f"{schedule} --criterion cross_entropy --save-dir {out}/dense"
    print("dense, bits:", train([*common(out, DENSE_UPDATES, 1), *ADAM, *flags.split()], 0.0))


def flags_of(setting: Setting, out: Path, plan: Path) -> list[str]:
    """The command line of one training."""
    if setting.schedule == "constant":  # of so long a cosine, as 13,500 updates are of the published 270,000
        period, floor = 20 * setting.updates, setting.lr * 2e-3
    else:
        period, floor = setting.updates // (3 if setting.schedule == "restart" else 1), 0.0
    schedule = f"--lr {setting.lr} --lr-scheduler cosine --lr-period-updates {period} --min-lr {floor} --lr-shrink 1"
    start = f"--quantization-config-path {plan} --finetune-from-model {out}/dense/checkpoint_last.pt"
    return [
        *common(out, setting.updates, setting.seed),
        *(NAG if setting.optimizer == "nag" else ADAM),
        *f"{schedule} {start} --criterion ipq --ipq-criterion cross_entropy --no-save --save-dir {out}/unused".split(),
    ]


def train(flags: list[str], power: float) -> float:
    """fairseq-train with this power of the cluster's size; the last validation's loss in bits, NaN if it diverged."""
    program = (
        "import fairseq_cli.train as train, fairseq_quant_noise, fairseq_quant_noise.layers.lookup as lookup;"
        f"fairseq_quant_noise.register(); lookup.GRADIENT_POWER = {power}; train.cli_main()"
    )
    done = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True)
    if "not finite any more" in done.stderr:
        return float("nan")
    found = re.findall(r'"valid_loss": "([0-9.]+|inf|nan)"', done.stdout + done.stderr)
    if done.returncode or not found:
        raise SystemExit(done.stderr[-3000:])
    return float(found[-1])


def run(out: Path, part: str) -> None:
    """Every setting that has no line yet."""
    lines, (number, of) = out / "runs.jsonl", map(int, part.split("/"))
    dense(out)
    for setting in grid.missing(islice(settings(), number - 1, None, of), lines):
        plan = out / f"plan-{setting.clusters}.yaml"
        plan.write_text(json.dumps(plan_of(setting.clusters)))  # JSON is YAML
        began = time.time()
        loss = train(flags_of(setting, out, plan), POWERS[setting.scale])
        grid.add({**asdict(setting), "ppl": round(2**loss, 2), "seconds": round(time.time() - began)}, lines)


def table(lines: Path) -> str:
    """A row a setting without its rate; the best PPL of each size of cluster and optimizer in bold."""
    rows: dict[tuple[str, ...], dict[float, float]] = {}
    best: dict[tuple[str, ...], float] = {}
    for line in map(json.loads, lines.read_text().splitlines()):
        key = tuple(line[k] for k in ("clusters", "optimizer", "schedule", "scale"))
        rows.setdefault(key, {})[line["lr"]] = line["ppl"]
        best[key[:2]] = min(best.get(key[:2], line["ppl"]), line["ppl"])
    cells = []
    for key, by_rate in sorted(rows.items(), key=lambda row: (int(row[0][0]), *row[0][1:])):
        bold = {lr: "**" if ppl == best[key[:2]] else "" for lr, ppl in by_rate.items()}
        ppls = (f"{lr:g}: {bold[lr]}{ppl:.0f}{bold[lr]}" for lr, ppl in sorted(by_rate.items()))
        cells.append((*key, ", ".join(ppls)))
    return "\n".join(markdown(HEADER, cells))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--part", default="1/1")
    given = parser.parse_args()
    if given.action == "run":
        run(given.path, given.part)
    else:
        print(table(given.path))


if __name__ == "__main__":
    main()
