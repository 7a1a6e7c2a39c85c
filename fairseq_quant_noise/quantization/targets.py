"""Find the weights of a model that a plan's stages quantize, before any work."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..errors import UserError
from ..layers.registry import QuantizedTensor
from ..plan.matching import match_rules
from ..plan.plan import Plan
from ..plan.rules import StageRule
from ..pq.kmeans import effective_centroids
from ..weights.blocks import check_block_size
from ..weights.discovery import Weight, find_weights


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
        """Size in bytes by the paper's accounting; a shared codebook counts with its first weight."""
        codebook = None if self.brings_codebook else "of its stage"
        sizes = self.block_size, self.n_centroids, self.centroid_bits
        return QuantizedTensor(self.rule.scheme, self.weight.shape, *sizes, codebook=codebook).paper_bytes


def resolve_stages(plan: Plan, model: nn.Module) -> list[Target]:
    """Find which weights the plan quantizes, in which stage and how, in the order of the model.

    Raises:
        UserError: a rule matches no weight, two stages match one weight, or a block size does not divide a weight or
            has no value for it.
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
    if not rule.format.has_codebook:
        return Target(weight, stage, rule)
    block_size = rule.block_size_of(weight.name, weight.module)
    check_block_size(weight.name, weight.shape, block_size)
    bits = rule.centroid_bits_of(weight.name, weight.module, centroid_bits)
    return Target(weight, stage, rule, block_size, rule.n_centroids_of(weight.name, weight.module), bits)


def _with_codebooks(targets: Sequence[Target], order: Sequence[int]) -> list[Target]:
    """Complete the targets with K and with shared codebooks: one for the weights of a stage alike in d, K and bits.

    A shared codebook's number is the position of its first weight in the model, so that each number is unique.
    """
    groups: dict[tuple[int, ...], list[Target]] = {}
    for target in targets:
        weight, sizes = target.weight, (target.block_size, target.n_centroids, target.centroid_bits)
        one_for_all = target.block_size is not None and target.rule.shares_codebook(weight.name, weight.module)
        key = (target.stage, *sizes) if one_for_all else (id(target),)
        groups.setdefault(key, []).append(target)  # type: ignore[arg-type]
    found: dict[int, Target] = {}
    for group in groups.values():
        number = order.index(id(group[0].weight)) if len(group) > 1 else None
        n_blocks = sum(math.prod(t.weight.shape) // (t.block_size or 1) for t in group)
        for i, target in enumerate(group):
            k = None if target.n_centroids is None else effective_centroids(n_blocks, target.n_centroids)
            found[id(target)] = replace(target, n_centroids=k, codebook=number, brings_codebook=i == 0)
    return [found[id(target)] for target in targets]
