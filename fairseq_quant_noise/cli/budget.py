"""Find the plans that spend bytes best, for `plan --budget`, `--target-loss` and `--frontier`."""

import copy
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ..accounting import MIB
from ..artifact import pack
from ..artifact.writer import header_bytes, serialize
from ..errors import UserError
from ..layers import join_
from ..layers.batch_statistics import batch_norms
from ..layers.pq import quantize_weight_
from ..layers.quantized import dense_weight
from ..layers.registry import QuantizedTensor
from ..plan.plan import Plan
from ..plan.rules import Structure
from ..quantization.budget.choice import best_choice
from ..quantization.budget.options import DENSE, Option, Priced
from ..quantization.budget.pricing import unpriced
from ..quantization.budget.text import Chosen, bytes_of, plan_text
from ..quantization.budget.uniform import uniform_choices
from ..quantization.quantize import quantized_values
from ..quantization.targets import resolve_stages
from ..utils.bits import code_dtype
from ..weights.blocks import code_shape
from ..weights.discovery import Weight

BEST = "best"
POINTS = 10  # of a frontier, beside the sizes of the uniform plans
GAIN = 0.015  # of the predicted loss, which is no closer than that
MORE = 3  # plans that are tried with what the first that fits leaves
UNKNOWN = 4096  # bytes of a budget left for the options of fairseq that a training of an architecture records
SUBNORMAL = 1e-9  # a variance that fp16 cannot hold (`utils/halves.py`)
TUNING = 512  # bytes of a budget left for what a tuning adds to the manifest: its codes, options of fairseq
TOLERANCE = 0.01  # of the bytes that --target-loss finds
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Subject:
    """What a plan is for: a network, dense, after the plan's `structure`."""

    network: nn.Module  # on the meta device where nobody has trained it
    config: Mapping[str, Any]  # how to build it (`Manifest.model`)
    structure: Structure | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the network is an architecture alone."""
        return any(parameter.is_meta for parameter in self.network.parameters())


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
        users: dict[int, list[str]] = {}
        for target in targets:
            if target.codebook is not None:
                users.setdefault(target.codebook, []).append(target.weight.tensor_name)
        keys = [
            (t.weight.tensor_name, t.rule.scheme, t.block_size, t.n_centroids, t.centroid_bits)
            + (() if t.codebook is None else tuple(users[t.codebook]))
            for t in targets
        ]
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


def smallest_plan(subject: Subject, budget: int | None = None) -> Planned:
    """The plan of the smallest options; with a budget, as a check before any work.

    Raises:
        UserError: it exceeds the budget.
    """
    smallest = planned_of(subject, best_choice(unpriced(subject.network), 0, _in_header))
    if budget is not None and smallest.bytes > budget:
        raise UserError(
            f"--budget: {_size(budget)} are too few; the smallest file of this network has {_size(smallest.bytes)}. "
            "Give more, or let fewer layers stay (--keep-layers) or share them (--share-layers)"
        )
    return smallest


def best_plan(subject: Subject, priced: Sequence[Priced], budget: int, smallest: Planned) -> Planned:
    """The plan whose packed file has at most `budget` bytes and whose predicted loss is least.

    What a file has beside the weights' bytes (what stays dense, the plan's own text) depends a little on the plan, so
    that plans are tried until the file fits, and a few more with what that leaves. Codebooks in 8 bits and shared ones
    must be predicted to win GAIN; else each weight has its own in fp16.

    Args:
        subject: what the plan is for.
        priced: its weights.
        budget: bytes.
        smallest: what is left where no other plan fits (`smallest_plan`).
    """
    plain = [replace(one, options=one.plain, shared=()) for one in priced]
    more = any(one.shared or len(one.plain) < len(one.options) for one in priced)
    searched = (plain, priced) if more else (plain,)
    found = [planned for of in searched if (planned := _best_plan(subject, of, budget, smallest)) is not None]
    if len(found) == 2 and found[1].predicted > (1 - GAIN) * found[0].predicted:
        return found[0]
    return found[-1] if found else priced_smallest(priced, smallest)


def _best_plan(subject: Subject, priced: Sequence[Priced], budget: int, smallest: Planned) -> Planned | None:
    """The plan of `best_plan` among the options given; None where none of them fits."""
    for_weights = budget
    least = bytes_of(smallest.chosen) + sum(_in_header(one.weight, one.option) for one in smallest.chosen)
    while for_weights >= least:
        found = planned_of(subject, best_choice(priced, for_weights, _in_header))
        if found.bytes <= budget:
            return _spending_more(subject, priced, budget, for_weights, found)
        for_weights -= found.bytes - budget
    return None


def _spending_more(
    subject: Subject, priced: Sequence[Priced], budget: int, for_weights: int, found: Planned
) -> Planned:
    """A plan at least as good as the one found, with what its file leaves of the budget."""
    last = found
    for _ in range(MORE):
        if last.bytes == budget:
            break
        for_weights += budget - last.bytes
        last = planned_of(subject, best_choice(priced, for_weights, _in_header))
        if last.bytes > budget:
            break
        found = min(found, last, key=lambda planned: planned.predicted)
    return found


@functools.cache
def _header_bytes(name: str, option: Option) -> int:
    if option.scheme == DENSE:
        return header_bytes(name, None)
    sizes = option.block_size, option.n_centroids, option.centroid_bits
    return header_bytes(
        name, QuantizedTensor(option.scheme, (1000, 100), *sizes, codebook=name if option.shared else None)
    )


def _in_header(weight: Weight, option: Option) -> int:
    """Bytes of the file's header that the weight takes, within a few."""
    return _header_bytes(weight.tensor_name, replace(option, bytes=0, loss=0.0))


def priced_smallest(priced: Sequence[Priced], smallest: Planned) -> Planned:
    """The plan of `smallest_plan`, with the losses that it is predicted to cost."""
    by_name = {one.name: one.option for one in smallest.chosen}
    chosen = [
        Chosen(
            one.weight, next(o for o in (*one.options, *one.shared) if replace(o, loss=0.0) == by_name[one.weight.name])
        )
        for one in priced
    ]
    return replace(smallest, chosen=chosen)


def planned_of(subject: Subject, chosen: Sequence[Chosen]) -> Planned:
    """A choice for each weight of the network as a plan, with the bytes of its file."""
    plan = Plan.of(yaml.safe_load(plan_text(chosen, structure=subject.structure)))
    return Planned(chosen, plan, file_bytes(subject, plan))


def least_plan(
    subject: Subject, priced: Sequence[Priced], target: float, losses: Losses, smallest: Planned
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
        tried = best_plan(subject, priced, middle, smallest)
        of_tried = losses(tried.plan)
        if of_tried <= target:
            found, loss, high = tried, of_tried, middle
        elif middle == high:  # as large as the dense network, which has less: its rounding alone can lose that much
            raise UserError(f"--target-loss {target:g}: no plan has so little; the largest has {of_tried:.3f}")
        else:
            low = middle
    return found, loss


def frontier(
    subject: Subject, priced: Sequence[Priced], smallest: Planned, count: int = POINTS
) -> list[tuple[str, Planned]]:
    """The uniform plans by name, and the best plans (BEST) at their sizes and at sizes between; from small to large.

    Args:
        subject: what the plan is for.
        priced: its weights.
        smallest: `smallest_plan`.
        count: of sizes between the smallest and the largest file, evenly spread in their logarithms.
    """
    uniform = [(name, planned_of(subject, chosen)) for name, chosen in uniform_choices(priced).items()]
    low, high = smallest.bytes, max(planned.bytes for _, planned in uniform)
    budgets = {int(low * (high / low) ** (i / max(count - 1, 1))) for i in range(count)}
    budgets |= {planned.bytes for _, planned in uniform}
    best: list[tuple[str, Planned]] = []
    for size in sorted(budgets):
        planned = best_plan(subject, priced, size, smallest)
        if not best or planned.predicted < best[-1][1].predicted:
            best.append((BEST, planned))
    return sorted([*best, *uniform], key=lambda point: point[1].bytes)


def file_bytes(subject: Subject, plan: Plan) -> int:
    """The bytes of the packed file that `quantize` would write; nothing is encoded, for codes of zeros take as many.

    Batch statistics, which are estimated anew, count as if no variance could be stored in fp16.
    """
    network, quantized = materialized(subject.network), []
    for norm in batch_norms(network).values():
        if norm.running_var is not None:
            norm.running_var.fill_(SUBNORMAL)
    for target in resolve_stages(plan, network):
        d, k = target.block_size, target.n_centroids
        if d is None or k is None:
            if subject.is_empty:
                dense_weight(target.weight).detach().zero_()
            quantized.append(target.rule.format.quantize_(target.weight, target.rule.scheme, target.rule.range))
        else:
            codes = torch.zeros(code_shape(target.weight.shape, d), dtype=code_dtype(k))
            how = target.centroid_bits, target.codebook
            quantized.append(quantize_weight_(target.weight, codes, torch.zeros(k, d), *how))
    join_(quantized)
    return len(serialize(pack(network, plan, subject.config)))


def materialized(network: nn.Module) -> nn.Module:
    """A copy of the network in memory, ties kept; weights of the meta device are zeros."""
    found = copy.deepcopy(network)
    made: dict[int, nn.Parameter] = {}
    for module in found.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(torch.zeros_like(parameter, device="cpu"))
                module._parameters[key] = made[id(parameter)]
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = torch.zeros_like(buffer, device="cpu")
    return found


def _size(size: float) -> str:
    return f"{size:,.0f} bytes ({size / MIB:.3f} MiB)"
