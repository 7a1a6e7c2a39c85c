"""Find the plan that spends a budget of bytes best, for `plan --budget`."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import yaml

from ..accounting import MIB
from ..artifact import pack
from ..artifact.writer import serialize
from ..checkpoints.checkpoint import Checkpoint
from ..errors import UserError
from ..layers.pq import quantize_weight_
from ..plan.plan import Plan
from ..quantization.budget.knapsack import choose
from ..quantization.budget.options import Priced, ways
from ..quantization.budget.text import Chosen, plan_text
from ..quantization.targets import resolve_stages
from ..utils.bits import code_dtype
from ..weights.blocks import code_shape
from ..weights.discovery import find_weights

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Planned:
    """A choice for each weight, as a plan."""

    chosen: Sequence[Chosen]
    plan: Plan
    bytes: int  # of the packed file


def budget_of(text: str, dense_bytes: int) -> int:
    """The bytes that `--budget` means: 10MiB, 10MB, 300000, or x17 for a 17th of the dense network.

    Raises:
        UserError: it means none, or no less than the dense network has.
    """
    found = re.fullmatch(r"(x?)(\d+(?:\.\d+)?) ?([A-Za-z]*)", text)
    if not found or found[3] not in _UNITS or (found[1] and found[3]) or not float(found[2]):
        raise UserError(f"--budget {text}: is no size; give 10MiB, 10MB, bytes, or x17 for a 17th of the dense network")
    size = dense_bytes / float(found[2]) if found[1] else float(found[2]) * _UNITS[found[3]]
    if size >= dense_bytes:
        raise UserError(f"--budget {text}: the dense network has {_size(dense_bytes)}; give less than that")
    return int(size)


def smallest_plan(checkpoint: Checkpoint, budget: int) -> Planned:
    """The plan of the smallest options, as a check before any work.

    Raises:
        UserError: it exceeds the budget.
    """
    weights = find_weights(checkpoint.network)
    options = [min(ways(weight.shape), key=lambda option: option.bytes) for weight in weights]
    smallest = _planned(checkpoint, [Chosen(*pair) for pair in zip(weights, options, strict=True)])
    if smallest.bytes > budget:
        raise UserError(
            f"--budget: {_size(budget)} are too few; the smallest file of this network has {_size(smallest.bytes)}. "
            "Give more, or prune or share layers first"
        )
    return smallest


def best_plan(checkpoint: Checkpoint, priced: Sequence[Priced], budget: int, smallest: Planned) -> Planned:
    """The plan whose packed file has at most `budget` bytes and whose predicted loss is least.

    What a file has beside the weights' codes (its names, what stays dense) depends a little on the plan, so that plans
    are tried until the file fits.

    Args:
        checkpoint: dense.
        priced: its weights.
        budget: bytes.
        smallest: what is left where no other plan fits (`smallest_plan`).
    """
    pairs = [[(option.bytes, option.loss) for option in one.options] for one in priced]
    for_weights = budget
    while for_weights >= sum(one.option.bytes for one in smallest.chosen):
        choice = zip(priced, choose(pairs, for_weights), strict=True)
        planned = _planned(checkpoint, [Chosen(one.weight, one.options[i]) for one, i in choice])
        if planned.bytes <= budget:
            return planned
        for_weights -= planned.bytes - budget
    return smallest


def _planned(checkpoint: Checkpoint, chosen: Sequence[Chosen]) -> Planned:
    plan = Plan.of(yaml.safe_load(plan_text(chosen)))
    return Planned(chosen, plan, file_bytes(checkpoint, plan))


def file_bytes(checkpoint: Checkpoint, plan: Plan) -> int:
    """The bytes of the packed file that `quantize` would write; nothing is encoded, for codes of zeros take as many."""
    network = copy.deepcopy(checkpoint.network)
    for target in resolve_stages(plan, network):
        d, k = target.block_size, target.n_centroids
        if d is None or k is None:
            target.rule.format.quantize_(target.weight, target.rule.scheme, target.rule.range)
        else:
            codes = torch.zeros(code_shape(target.weight.shape, d), dtype=code_dtype(k))
            quantize_weight_(target.weight, codes, torch.zeros(k, d))
    return len(serialize(pack(network, plan, checkpoint.config)))


def _size(size: float) -> str:
    return f"{size:,.0f} bytes ({size / MIB:.3f} MiB)"
