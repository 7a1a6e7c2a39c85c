"""A plan applied to a model: a row a tensor, with its size by the paper's accounting. Nothing is computed or changed.

The paper counts (arXiv 2004.07320, section 7.4 and table 1; MiB = bytes / 2^20), for a weight of n blocks:

    pq          n * log2(K) / 8 bytes of codes, K * d * 2 bytes of centroids (fp16; K * d for int8 ones); the
                centroids of a shared codebook once, with its first weight
    intN        N / 8 bytes a number; scales apart
    the rest    4 bytes a number (fp32), biases and norms included; but where every weight is of one scheme intN,
                the rest counts N / 8 bytes a number too (its 236 and 118 MB are the dense model's 942 by 4 and by 8)

It works on the meta device, so that the sizes of a model cost nothing.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from ..errors import UserError
from ..layers.pq import pq_bytes
from ..layers.scalar import int_bytes
from ..plan.rules import Plan, StageRule, match_rules
from ..pq.kmeans import effective_centroids
from ..scalar import bits_of
from ..weights.blocks import check_block_size
from ..weights.discovery import Weight, find_weights

MIB = 2**20


@dataclass(frozen=True)
class Target:
    """A weight that a stage quantizes."""

    weight: Weight
    stage: int  # index into the plan's stages
    rule: StageRule
    block_size: int | None = None  # d, of pq
    n_centroids: int | None = None  # K of pq: the rule's, or less where a codebook has fewer than 4 K blocks
    centroid_bits: int = 16
    codebook: int | None = None  # number of a shared one
    brings_codebook: bool = True  # the first weight of a shared one, or one with its own

    @property
    def paper_bytes(self) -> float:
        """By the paper's accounting."""
        numbers = math.prod(self.weight.shape)
        if self.block_size is None or self.n_centroids is None:
            return int_bytes(numbers, self.rule.bits or 32)
        bits = self.centroid_bits if self.brings_codebook else 0
        return pq_bytes(numbers // self.block_size, self.block_size, self.n_centroids, bits)


@dataclass(frozen=True)
class Row:
    """One tensor of the model."""

    name: str
    scheme: str  # pq, int2 ... int8, or dense
    shape: tuple[int, ...]
    block_size: int | None
    n_centroids: int | None
    bytes: float  # the paper's accounting; 0 for a tied copy
    tied_to: str | None  # the tensor that stores it

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self) | {"shape": list(self.shape)}


@dataclass(frozen=True)
class Table:
    """All tensors of a model under a plan."""

    rows: list[Row]
    original_bytes: int | None = None  # of the dense model before its layers were shared or pruned

    @property
    def parameters(self) -> int:
        """Numbers in the dense model, tied ones once."""
        return sum(math.prod(r.shape) for r in self.rows if r.tied_to is None)

    @property
    def dense_bytes(self) -> int:
        """4 bytes a parameter."""
        return 4 * self.parameters

    @property
    def paper_bytes(self) -> float:
        """The paper's accounting of the quantized model."""
        return sum(r.bytes for r in self.rows)

    def ratio_of(self, dense_bytes: int) -> float:
        """How many times smaller than so many bytes the quantized model is."""
        return dense_bytes / self.paper_bytes if self.paper_bytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The keys of `plan --json`."""
        return {
            "parameters": self.parameters,
            "dense_bytes": self.dense_bytes,
            "paper_bytes": self.paper_bytes,
            "ratio": self.ratio_of(self.dense_bytes),
            "original_bytes": self.original_bytes or self.dense_bytes,
            "original_ratio": self.ratio_of(self.original_bytes or self.dense_bytes),
            "tensors": [row.to_dict() for row in self.rows],
        }


def resolve_stages(plan: Plan, model: nn.Module) -> list[Target]:
    """Which weights the plan quantizes, in which stage and how, in the order of the model.

    Raises:
        UserError: a rule matches nothing, two stages match one weight, or a block size does not divide.
    """
    weights = find_weights(model)
    matches = match_rules("stage", plan.stages, [w.name for w in weights])
    targets = []
    for weight, rules in zip(weights, matches, strict=True):
        if len(rules) > 1:
            raise UserError(
                f"{weight.name}: matched by two stages, '{rules[0].match}' and '{rules[1].match}'; "
                "narrow one of them, for a weight is quantized once"
            )
        if rules:
            targets.append(_target(weight, plan.stages.index(rules[0]), rules[0], plan.centroids.bits))
    return _with_codebooks(targets, [id(weight) for weight in weights])


def _target(weight: Weight, stage: int, rule: StageRule, centroid_bits: int) -> Target:
    weight.check_ties()
    if rule.bits is not None:
        return Target(weight, stage, rule)
    block_size = rule.block_size_of(weight.name, weight.module)
    check_block_size(weight.name, weight.module, block_size)
    return Target(weight, stage, rule, block_size, rule.n_centroids_of(weight.name, weight.module), centroid_bits)


def _with_codebooks(targets: Sequence[Target], order: Sequence[int]) -> list[Target]:
    """The targets with K, and with the codebooks that are shared: by the weights of a stage that have the same d and K.

    A shared codebook's number is the place of its first weight in the model, so that no two have the same.
    """
    groups: dict[tuple[int, ...], list[Target]] = {}
    for target in targets:
        one_for_all = target.block_size is not None and target.rule.codebook == "shared"
        key = (target.stage, target.block_size, target.n_centroids) if one_for_all else (id(target),)
        groups.setdefault(key, []).append(target)  # type: ignore[arg-type]
    found: dict[int, Target] = {}
    for group in groups.values():
        number = order.index(id(group[0].weight)) if len(group) > 1 else None
        n_blocks = sum(math.prod(t.weight.shape) // (t.block_size or 1) for t in group)
        for i, target in enumerate(group):
            k = None if target.n_centroids is None else effective_centroids(n_blocks, target.n_centroids)
            found[id(target)] = replace(target, n_centroids=k, codebook=number, brings_codebook=i == 0)
    return [found[id(target)] for target in targets]


def rest_bits(schemes: Iterable[str]) -> int:
    """Bits a number that the paper counts for biases and norms, for the schemes of all weights (see above)."""
    found = set(schemes)
    return (bits_of(found.pop()) if len(found) == 1 else None) or 32


def make_table(model: nn.Module, targets: Sequence[Target] = (), original_bytes: int | None = None) -> Table:
    """A row for each parameter of `model` (tied copies included), quantized as `targets` say, dense elsewhere.

    Args:
        model: any network, on the meta device too.
        targets: of `resolve_stages`.
        original_bytes: of the dense model before its layers were shared or pruned.
    """
    by_name = {t.weight.tensor_name: t for t in targets}
    first = {id(t.weight.stored): t.weight.tensor_name for t in targets}  # the owner, whichever holder comes first
    schemes = [by_name[w.tensor_name].rule.scheme if w.tensor_name in by_name else "dense" for w in find_weights(model)]
    rest = rest_bits(schemes)
    rows = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape = tuple(parameter.shape)
        owner = first.setdefault(id(parameter), name)
        target = by_name.get(owner)
        if target is None:
            row = Row(name, "dense", shape, None, None, math.prod(shape) * rest / 8, None)
        else:
            d, k = target.block_size, target.n_centroids
            row = Row(name, target.rule.scheme, shape, d, k, target.paper_bytes, None)
        rows.append(row if owner == name else _tied(row, owner))
    return Table(rows, original_bytes)


def _tied(row: Row, owner: str) -> Row:
    return Row(row.name, row.scheme, row.shape, row.block_size, row.n_centroids, 0.0, owner)
