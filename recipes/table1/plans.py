"""Every plan that recipes/table1.sh trains, fine-tunes or quantizes with.

    python -m recipes.table1.plans runs/table1

writes, from the plans in configs/plans:

    RUN/noise.yaml                  the noise of a training, for the runs whose noise fairseq's flags cannot say
    RUN/ipq-plan.yaml               that noise and the stages of small.yaml, in one plan
    RUN/ipq-int8-plan.yaml          that noise and the stages of small_ipq_int8.yaml
    plans/{int4,int8}-channel.yaml  small_int4.yaml and small_int8.yaml, with a range a channel
"""

import argparse
from pathlib import Path
from typing import Any

import yaml

PLANS = Path(__file__).parents[2] / "configs/plans"
LAYERS = r"decoder\.layers\.\d+\."
#: The weights and blocks of the stages in small.yaml.
TARGETS: tuple[dict[str, Any], ...] = (
    {"match": LAYERS + "fc[12]", "block_size": 8},
    {"match": r"decoder\.embed_tokens", "block_size": 8},
    {"match": LAYERS + r"self_attn\.(q|k|v|out)_proj", "block_size": 4},
)
#: What the three noise rules of a run have in common.
NOISE: dict[str, dict[str, Any]] = {
    "pq-qat": {"kind": "pq", "p": 1.0},
    "proxy": {"kind": "proxy", "p": 0.05},
    "pq": {"kind": "pq", "p": 0.05},
    "pq-clusters": {"kind": "pq", "p": 0.05, "choice": "clusters"},
    "proxy-clusters": {"kind": "proxy", "p": 0.05, "choice": "clusters"},
}
IPQ = ("none", *NOISE)  # the runs that are fine-tuned in stages
IPQ_INT8 = ("none", "proxy")


def noise(run: str) -> dict[str, Any]:
    """The noise-only plan of a run; empty for a run without noise."""
    return {"noise": [{**target, **NOISE[run]} for target in TARGETS]} if run in NOISE else {}


def shipped(name: str) -> dict[str, Any]:
    """A plan in configs/plans."""
    plan: dict[str, Any] = yaml.safe_load((PLANS / f"{name}.yaml").read_text(encoding="utf-8"))
    return plan


def by_channel(scheme: str) -> dict[str, Any]:
    """small_int4.yaml or small_int8.yaml with a range for each channel."""
    plan = shipped(f"small_{scheme}")
    return plan | {"stages": [stage | {"range": "channel"} for stage in plan["stages"]]}


def all_plans() -> dict[str, dict[str, Any]]:
    """Path below the output folder -> plan."""
    return {
        **{f"{run}/noise.yaml": noise(run) for run in NOISE},
        **{f"{run}/ipq-plan.yaml": noise(run) | shipped("small") for run in IPQ},
        **{f"{run}/ipq-int8-plan.yaml": noise(run) | shipped("small_ipq_int8") for run in IPQ_INT8},
        **{f"plans/{scheme}-channel.yaml": by_channel(scheme) for scheme in ("int4", "int8")},
    }


def main() -> None:
    """Write the plans."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    for name, plan in all_plans().items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
