"""Find the plans that spend bytes best, for `plan --budget`, `--target-loss` and `--frontier`."""

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import yaml
from torch import Tensor, nn

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
from ..quantization.budget.uniform import uniform_choices
from ..quantization.quantize import quantized_values
from ..quantization.targets import resolve_stages
from ..utils.bits import code_dtype
from ..weights.blocks import code_shape
from ..weights.discovery import find_weights

BEST = "best"
POINTS = 10  # of a frontier, beside the sizes of the uniform plans
TUNING = 512  # bytes of a budget left for what a tuning adds to the manifest: its codes, options of fairseq
TOLERANCE = 0.01  # of the bytes that --target-loss finds
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Planned:
    """A choice for each weight, as a plan."""

    chosen: Sequence[Chosen]
    plan: Plan
    bytes: int  # of the packed file

    @property
    def predicted(self) -> float:
        """The predicted loss, in no unit."""
        return sum(one.option.loss for one in self.chosen)


class Losses:
    """The measured losses of plans; a weight that several plans store in the same way is encoded once.

    Args:
        model: the dense network.
        importance: by the tensor's name, what k-means weighs its errors by, of its shape.
        measure: the loss with other values for the tensors of some names, such as `plugin.calibration.loss_on`'s.
        progress: called with lines about the encoding.
    """

    def __init__(
        self,
        model: nn.Module,
        importance: Mapping[str, Tensor],
        measure: Callable[[Mapping[str, Tensor]], float],
        progress: Callable[[str], None],
    ) -> None:
        self._model, self._importance, self._measure, self._progress = model, importance, measure, progress
        self._values: dict[tuple[object, ...], Tensor] = {}
        self.dense = measure({})

    def __call__(self, plan: Plan) -> float:
        """The loss with each weight as `quantize` would give it to evaluation."""
        targets = resolve_stages(plan, self._model)
        keys = [(t.weight.tensor_name, t.rule.scheme, t.block_size, t.n_centroids) for t in targets]
        new = [(key, t) for key, t in zip(keys, targets, strict=True) if key not in self._values]
        of_new = [target for _, target in new]
        found = quantized_values(of_new, seed=0, importance=self._importance, progress=self._progress)
        self._values |= {key: value for (key, _), (_, value) in zip(new, found, strict=True)}
        return self._measure({str(key[0]): self._values[key] for key in keys})


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


def smallest_plan(checkpoint: Checkpoint, budget: int | None = None) -> Planned:
    """The plan of the smallest options; with a budget, as a check before any work.

    Raises:
        UserError: it exceeds the budget.
    """
    weights = find_weights(checkpoint.network)
    options = [min(ways(weight.shape), key=lambda option: option.bytes) for weight in weights]
    smallest = planned_of(checkpoint, [Chosen(*pair) for pair in zip(weights, options, strict=True)])
    if budget is not None and smallest.bytes > budget:
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
        planned = planned_of(checkpoint, [Chosen(one.weight, one.options[i]) for one, i in choice])
        if planned.bytes <= budget:
            return planned
        for_weights -= planned.bytes - budget
    return priced_smallest(priced, smallest)


def priced_smallest(priced: Sequence[Priced], smallest: Planned) -> Planned:
    """The plan of `smallest_plan`, with the losses that it is predicted to cost."""
    chosen = [Chosen(one.weight, min(one.options, key=lambda option: option.bytes)) for one in priced]
    return replace(smallest, chosen=chosen)


def planned_of(checkpoint: Checkpoint, chosen: Sequence[Chosen]) -> Planned:
    """A choice for each weight of the checkpoint as a plan, with the bytes of its file."""
    plan = Plan.of(yaml.safe_load(plan_text(chosen)))
    return Planned(chosen, plan, file_bytes(checkpoint, plan))


def least_plan(
    checkpoint: Checkpoint, priced: Sequence[Priced], target: float, losses: Losses, smallest: Planned
) -> tuple[Planned, float]:
    """The smallest plan, within TOLERANCE, whose measured loss is at most `target`; and its loss.

    Raises:
        UserError: the dense network's loss is no less.
    """
    if target <= losses.dense:
        raise UserError(
            f"--target-loss {target:g}: the dense network has a loss of {losses.dense:.3f}; give more than that"
        )
    found, loss = priced_smallest(priced, smallest), losses(smallest.plan)
    if loss <= target:
        return found, loss
    low, high = smallest.bytes, 4 * sum(math.prod(one.weight.shape) for one in priced)
    while loss > target or high > (1 + TOLERANCE) * low:
        middle = int((low * high) ** 0.5) if high > (1 + TOLERANCE) * low else high
        tried = best_plan(checkpoint, priced, middle, smallest)
        of_tried = losses(tried.plan)
        if of_tried <= target:
            found, loss, high = tried, of_tried, middle
        elif middle == high:  # as large as the dense network, which has less: its rounding alone can lose that much
            raise UserError(f"--target-loss {target:g}: no plan has so little; the largest has {of_tried:.3f}")
        else:
            low = middle
    return found, loss


def frontier(
    checkpoint: Checkpoint, priced: Sequence[Priced], smallest: Planned, count: int = POINTS
) -> list[tuple[str, Planned]]:
    """The uniform plans by name, and the best plans (BEST) at their sizes and at sizes between; from small to large.

    Args:
        checkpoint: dense.
        priced: its weights.
        smallest: `smallest_plan`.
        count: of sizes between the smallest and the largest file, evenly spread in their logarithms.
    """
    uniform = [(name, planned_of(checkpoint, chosen)) for name, chosen in uniform_choices(priced).items()]
    low, high = smallest.bytes, max(planned.bytes for _, planned in uniform)
    budgets = {int(low * (high / low) ** (i / max(count - 1, 1))) for i in range(count)}
    budgets |= {planned.bytes for _, planned in uniform}
    best: list[tuple[str, Planned]] = []
    for size in sorted(budgets):
        planned = best_plan(checkpoint, priced, size, smallest)
        if not best or planned.predicted < best[-1][1].predicted:
            best.append((BEST, planned))
    return sorted([*best, *uniform], key=lambda point: point[1].bytes)


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
