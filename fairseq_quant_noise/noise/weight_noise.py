"""The noise of one weight: draw its blocks and distort them when the weight is read."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import in_graph
from ..plan.rules import NoiseRule
from ..plan.vocabulary import EPOCH
from ..utils.autograd import in_backward
from ..weights.blocks import as_blocks
from ..weights.discovery import Weight
from . import operators
from .distortions import Codebook, make_distortion
from .draw import NoiseDraw
from .psi import draw_blocks, draw_clusters, psi
from .schedule import p_at


class RuleNoise:
    """One rule on one weight: its J, its distortion, and when that was last fitted."""

    def __init__(self, name: str, rule: NoiseRule, weight: Weight) -> None:
        rows, numbers = weight.shape[0], math.prod(weight.shape)
        self.rule = rule
        self.n_blocks = numbers // rule.d
        self.phi = make_distortion(name, rule, rows)
        self.clusters = Codebook(name, rule, rows) if rule.choice == "clusters" else None
        self.fitted: int | None = None  # the update, or the epoch, of the last fit

    def refresh(self, stored: Tensor, draw: NoiseDraw) -> None:
        """Fit the distortion and the clusters to `stored`, (rows, …), where the rule's interval asks for it.

        Raises:
            UserError: the weight holds NaN or infinity, and the distortion checks it.
        """
        by_epoch = self.rule.interval == EPOCH
        now = draw.epoch if by_epoch else draw.update
        step = 1 if by_epoch else int(self.rule.interval)
        if self.fitted is not None and self.fitted <= now < self.fitted + step:
            return
        with torch.no_grad():
            blocks = as_blocks(stored, self.rule.d)
            self.phi.fit(blocks)
            if self.clusters is not None:
                self.clusters.fit(blocks)
        # A layer that starts as zeros has no range or codebook yet, and is looked at again at the next draw.
        self.fitted = now if self.rule.interval == 1 or bool(stored.detach().any()) else None

    def draw_hit(self, p: float, generator: torch.Generator) -> Tensor | None:
        """J as an (n,) bool mask, or None for all blocks."""
        if p >= 1:
            return None
        if self.clusters is None:
            return draw_blocks(self.n_blocks, p, generator)
        self.clusters.to(generator.device)
        assert self.clusters.codes is not None
        assert self.clusters.centroids is not None
        return draw_clusters(self.clusters.codes, len(self.clusters.centroids), p, generator)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to make the same noise."""
        clusters = self.clusters.state() if self.clusters is not None else {}
        return {"rule": self._measures(), "fitted": self.fitted, "phi": self.phi.state(), "clusters": clusters}

    def _measures(self) -> list[object]:
        """The fields of the rule that decide what is measured."""
        rule = self.rule
        return [list(rule.kinds), rule.d, rule.choice, rule.n_centroids, rule.range]

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave; a rule that measures something else starts anew."""
        if state["rule"] != self._measures():
            return
        self.fitted = state["fitted"]
        self.phi.load_state(state["phi"])
        if self.clusters is not None:
            self.clusters.load_state(state["clusters"])


class WeightNoise:
    """The noise of one weight: rules, one after the other, each with its own J."""

    def __init__(self, draw: NoiseDraw, index: int, weight: Weight, rules: Sequence[NoiseRule]) -> None:
        self.draw = draw
        self.index = index  # makes the J of one weight independent of another's
        self.name = weight.name
        self.rules = [RuleNoise(weight.name, rule, weight) for rule in rules]
        self.hits: list[tuple[RuleNoise, Tensor | None]] = []  # the rules that act, and their J, for the seed below
        self.hits_of: tuple[int | None, torch.device | None] = (None, None)
        self.turned = weight.turned
        self.is_tied = len(weight.places) > 1
        self.seen: tuple[Tensor, bool, Tensor] | None = None  # for a tied weight: (stored, with gradient?, as read)

    def __call__(self, module: nn.Module, stored: Tensor) -> Tensor:
        """The weight as `module` reads it, of its shape: noised in a training forward, else `stored` itself."""
        if not module.training or self.draw.depth == 0 or self.draw.muted:
            return stored
        if in_graph():
            return operators.noised(stored, self.draw.seed_tensor, self.draw.number, self.name)
        if self.draw.seed is None:
            return stored
        if self.hits_of != (self.draw.seed, stored.device):
            self._draw_hits(stored, self.draw.seed)
        if not self.is_tied or in_backward():
            return self._noised(stored)
        if self.seen is None or self.seen[0] is not stored or self.seen[1] != torch.is_grad_enabled():
            self.seen = stored, torch.is_grad_enabled(), self._noised(stored)
        return self.seen[2]

    def by_seed(self, stored: Tensor, seed: int) -> Tensor:
        """The weight of a forward with this seed, of its shape; for a graph, in which nothing else is kept."""
        if self.hits_of != (seed, stored.device):
            self._draw_hits(stored, seed)
        return self._noised(stored)

    def _noised(self, stored: Tensor) -> Tensor:
        weight = stored.transpose(0, 1) if self.turned else stored  # (rows, …)
        for rule, hit in self.hits:
            weight = psi(weight, hit, rule.rule.d, rule.phi)
        weight = weight.transpose(0, 1) if self.turned else weight
        if weight.requires_grad:
            weight.register_hook(self._spend)
        return weight

    def __getstate__(self) -> dict[str, Any]:
        """For `pickle` and `copy`: without what a forward has read."""
        return self.__dict__ | {"seen": None}

    def _draw_hits(self, stored: Tensor, seed: int) -> None:
        """Draw J for every rule, and fit the rules that are due, for this seed."""
        generator = torch.Generator(stored.device)
        generator.manual_seed(seed + self.index)
        self.hits, self.seen = [], None
        for rule in self.rules:
            p = p_at(rule.rule.p, rule.rule.schedule, self.draw.at)
            if p > 0:
                if not in_backward():  # a layer that runs again has been fitted in its own forward
                    rule.refresh(stored.transpose(0, 1) if self.turned else stored, self.draw)
                self.hits.append((rule, rule.draw_hit(p, generator)))
        self.hits_of = (seed, stored.device)

    def _spend(self, gradient: Tensor) -> None:
        """Mark the draw as spent: its backward has reached the weight, so every use of the weight is over."""
        self.draw.spent = True
        self.seen = None
