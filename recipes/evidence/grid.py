"""The runs of recipes/evidence.sh: which networks are trained, and which packed files are made of each.

    python -m recipes.evidence.grid --list                       a network a line, with its files
    python -m recipes.evidence.grid OUT/seed-1 --updates 1800    NETWORK/settings for the shell, and every plan

The corpus, the network and the trainings are those of the quickstart (recipes/lib.sh), with fewer words and updates.
"""

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LAYERS = r"decoder\.layers\.\d+\."
#: Feed-forward, embedding (and softmax), attention: the order of iPQ's stages.
WEIGHTS = (LAYERS + "fc[12]", r"decoder\.embed_tokens", LAYERS + r"self_attn\.(q|k|v|out)_proj")
BLOCKS = (8, 8, 4)
SHARED_BLOCKS = (4, 8, 4)  # with one codebook a stage: the same bytes, for codebooks are a quarter of so small a file


def stages(
    blocks: tuple[int, ...] = BLOCKS,
    k: int = 256,
    order: tuple[int, ...] = (0, 1, 2),
    codebook: str = "own",
    **centroids: Any,
) -> dict[str, Any]:
    """A plan for iPQ: block sizes by WEIGHTS, K, the order of the stages. As in the paper, all errors count alike."""
    rules = [{"match": WEIGHTS[i], "block_size": blocks[i], "n_centroids": k, "codebook": codebook} for i in order]
    return {"stages": rules, "centroids": {"weighted": False, **centroids}}


def trained(plan: dict[str, Any]) -> dict[str, Any]:
    """The same weights and bytes, all quantized at once, with codes that train (docs/codes.md)."""
    return plan | {"codes": "train", "tuning": {"stages": "joint"}}


def rounded(scheme: str, by: str = "tensor") -> dict[str, Any]:
    """A plan that rounds every weight, with a range a tensor or a channel."""
    return {"stages": [{"match": weights, "scheme": scheme, "range": by} for weights in WEIGHTS]}


def noise(kind: str, p: float, **more: Any) -> dict[str, Any]:
    """A plan's noise on every weight, in the blocks of `stages`."""
    rules = zip(WEIGHTS, BLOCKS, strict=True)
    return {"noise": [{"match": m, "block_size": d, "kind": kind, "p": p, **more} for m, d in rules]}


@dataclass(frozen=True)
class File:
    """How a packed file is made: at one go, or in stages of fine-tuning, perhaps with the dense network as teacher."""

    plan: dict[str, Any]
    staged: bool = True
    teacher: bool = False


FILES = {
    "one-shot": File(stages(), staged=False),
    "ipq": File(stages()),
    "ipq-teacher": File(stages(), teacher=True),
    "one-shot-weighted": File(stages(weighted=True), staged=False),
    "one-shot-feedback": File(stages(weighted=True) | {"encode": "feedback"}, staged=False),
    "ipq-weighted": File(stages(weighted=True)),
    "one-shot-shared": File(stages(SHARED_BLOCKS, codebook="shared"), staged=False),
    "ipq-shared": File(stages(SHARED_BLOCKS, codebook="shared")),
    "ipq-shared-weighted": File(stages(SHARED_BLOCKS, codebook="shared", weighted=True)),
    "ipq-int8": File(stages(dtype="int8")),
    "ipq-attention-first": File(stages(order=(2, 1, 0))),
    "ipq-embedding-first": File(stages(order=(1, 0, 2))),
    "ipq-d4": File(stages((4, 4, 4))),
    "ipq-d16": File(stages((16, 16, 8))),
    "ipq-k64": File(stages(k=64)),
    "ipq-k16": File(stages(k=16)),
    "best": File(trained(stages(weighted=True))),
    "best-d16": File(trained(stages((16, 16, 8), weighted=True))),
    "best-k64": File(trained(stages(k=64, weighted=True))),
    "int4": File(rounded("int4"), staged=False),
    "int8": File(rounded("int8"), staged=False),
    "int4-channel": File(rounded("int4", "channel"), staged=False),
    "int8-channel": File(rounded("int8", "channel"), staged=False),
}
IPQ = (
    "one-shot",
    "ipq",
    "ipq-k64",
)  # the last one is as extreme as the paper's files: a twentieth of the dense network
OURS = (
    "one-shot-weighted",
    "one-shot-feedback",
    "ipq-weighted",
    "one-shot-shared",
    "ipq-shared",
    "ipq-shared-weighted",
    "best",
    "best-k64",
)
SMALLEST = ("ipq-k16", "ipq-shared-weighted")
CURVES = ("ipq-d4", "ipq-d16", "ipq-k16")


@dataclass(frozen=True)
class Network:
    """A training, and the files that are made of its network."""

    files: tuple[str, ...]
    noise: dict[str, Any] | None = None
    flags: tuple[str, ...] = ()  # of fairseq-train
    start: str = ""  # the network that it goes on from, for a third of the updates
    keep: str = ""  # layers that are kept of `start`, which is not trained further

    def noise_for(self, updates: int | None = None) -> dict[str, Any]:
        """The noise of a training of so many updates, of which a schedule takes two thirds; without, the final p."""
        rules = [dict(rule) for rule in (self.noise or {"noise": []})["noise"]]
        for rule in rules:
            if (schedule := rule.pop("schedule", None)) and updates is not None:
                rule["schedule"] = schedule | {"updates": updates * 2 // 3}
        return {"noise": rules} if rules else {}


SHARED = ("--share-layers", "2", "--decoder-layerdrop", "0.2")
NETWORKS = {
    "none": Network((*FILES,)),
    **{f"proxy-{p}": Network(IPQ, noise("proxy", p)) for p in (0.02, 0.1, 0.2, 0.5)},
    "proxy-0.05": Network((*IPQ, *OURS, "ipq-teacher", "ipq-int8", *CURVES), noise("proxy", 0.05)),
    "proxy-schedule": Network(IPQ, noise("proxy", 0.1, schedule={"kind": "linear", "from": 0.0})),
    "pq-0.05": Network(IPQ, noise("pq", 0.05)),
    "pq-1": Network(IPQ, noise("pq", 1.0)),
    "int4-0.5": Network(("int4",), noise("int4", 0.5)),
    "int4-1": Network(("int4",), noise("int4", 1.0)),
    "int4-channel-0.5": Network(("int4-channel",), noise("int4", 0.5, range="channel")),
    "int8-0.5": Network(("int8",), noise("int8", 0.5)),
    "int8-1": Network(("int8",), noise("int8", 1.0)),
    "longer": Network(IPQ, start="none"),
    "posthoc": Network(IPQ, noise("proxy", 0.05), start="none"),
    "shared": Network((*IPQ, *SMALLEST), noise("proxy", 0.05), SHARED),
    "shared-pruned": Network((*IPQ, *SMALLEST), noise("proxy", 0.05), SHARED, start="shared", keep="every-other"),
}


def write(folder: Path, updates: int) -> None:
    """The plans and the settings of every network, below `folder`, for trainings of so many updates."""
    for name, network in NETWORKS.items():
        of = folder / name
        of.mkdir(parents=True, exist_ok=True)
        settings = {"START": network.start, "KEEP": network.keep}
        lists = {"FLAGS": network.flags, "FILES": network.files}
        plans = {file: network.noise_for() | FILES[file].plan for file in network.files}
        lists["STAGED"] = tuple(file for file in network.files if FILES[file].staged)
        lists["TAUGHT"] = tuple(file for file in network.files if FILES[file].teacher)
        if network.noise:
            plans["noise"] = network.noise_for(updates)
        for plan, content in plans.items():
            (of / f"{plan}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        lines = [f"{key}={shlex.quote(value)}" for key, value in settings.items()]
        lines += [f"{key}=({shlex.join(values)})" for key, values in lists.items()]
        (of / "settings").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Print or write the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--updates", type=int, default=1800)
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if args.out is not None:
        write(args.out, args.updates)
    if args.list:
        print("\n".join(f"{name}: {' '.join(network.files)}" for name, network in NETWORKS.items()))


if __name__ == "__main__":
    main()
