"""Attach and detach: a model whose weights are noised wherever a training forward reads them.

What "one forward" means, and so when J is drawn anew:
- calling the model draws; everything until the next call sees the same J, so that a tied weight has the same noise
  in the embedding, in the adaptive softmax (which fairseq's criterion calls after the model), and in a layer that
  activation checkpointing runs again during backward;
- calling a part of the model directly (`model.decoder(...)`) draws too, once the last draw's backward has run.

A layer that runs again during backward gets the J of its own forward, even when another forward came between: the
checkpoint restores the random state, and that tells the draw.

The seed of a draw comes from torch's global generator, which fairseq seeds at every update, so that runs repeat and
resume exactly. Each weight then has its own generator: its noise does not depend on the order in which layers run,
or on LayerDrop. Outside a forward, and in eval mode, `module.weight` is the stored Parameter.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..access import intercept, release
from ..blocks import as_blocks, check_block_size
from ..errors import UserError
from ..plan import EPOCH, NoiseRule, match_rules
from ..weights import Weight, find_weights
from .distortions import Codebook, make_distortion
from .psi import draw_blocks, draw_clusters, psi
from .schedule import p_at

_ATTRIBUTE = "_quant_noise"  # on the root module: its NoiseDraw
_MAX_SEEDS = 10_000  # of forwards whose backward never came


def _in_backward() -> bool:
    """Whether autograd is running, which is when checkpointed layers run again."""
    return torch._C._current_graph_task_id() != -1


def _random_state() -> int:
    """A hash of torch's random state on the CPU, which fairseq's and torch's checkpointing put back before a rerun."""
    return hash(bytes(torch.get_rng_state().numpy()))


class NoiseDraw:
    """When a forward starts and ends, and the seed of the J that it uses."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.depth = 0  # how many watched modules are running
        self.seed: int | None = None
        self.at = 0  # the update of this seed
        self.spent = True  # the current draw's backward has run
        self.handles: list[Any] = []
        self.noised: list[nn.Module] = []  # whose weights are noised
        self.seeds: dict[int, tuple[int, int]] = {}  # random state on entering a module -> seed, update of that forward
        self.latest: tuple[int | None, int] | None = None  # what to return to after a layer has run again
        self.weights: dict[str, WeightNoise] = {}  # by the weight's name
        self.muted = False  # reads see the stored weight, for a measurement
        self.update = 0  # the update that schedules and intervals go by
        self.epoch = 0
        self.counts = True  # each draw is an update, until somebody says which update it is
        self.draws = 0

    def set_num_updates(self, update: int) -> None:
        """Say which update comes, from 0; from now on draws are not counted as updates."""
        self.update, self.counts = update, False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same noise: plain containers and tensors."""
        weights = {name: [rule.state() for rule in noise.rules] for name, noise in self.weights.items()}
        return {"update": self.update, "draws": self.draws, "epoch": self.epoch, "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave; weights whose rules have changed start anew."""
        self.update, self.draws, self.epoch = state["update"], state["draws"], state["epoch"]
        for name, rules in state["weights"].items():
            noise = self.weights.get(name)
            if noise is not None and len(noise.rules) == len(rules):
                for rule, saved in zip(noise.rules, rules, strict=True):
                    rule.load_state(saved)

    def watch(self, module: nn.Module) -> None:
        """Count `module` as running between its call and its return."""
        self.handles.append(module.register_forward_pre_hook(self._enter))
        self.handles.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if _in_backward():
            if self.depth == 0:
                self.latest = self.seed, self.at
                self.seed, self.at = self.seeds.get(_random_state(), self.latest)
        else:
            self._enter_forward(module)
        self.depth += 1

    def _enter_forward(self, module: nn.Module) -> None:
        if module is self.root:
            self.depth = 0  # a forward that was interrupted has not left
        fresh = module is self.root or (self.depth == 0 and self.spent)
        if fresh and any(m.training for m in self.noised):
            if self.spent or len(self.seeds) > _MAX_SEEDS:
                self.seeds.clear()
            self.seed = int(torch.randint(2**62, (1,)))
            self.spent = False
            if self.counts:
                self.update = self.draws
            self.draws += 1
            self.at = self.update
        if self.seed is not None and module.training:
            self.seeds[_random_state()] = self.seed, self.at

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.depth = max(self.depth - 1, 0)
        if self.depth == 0 and self.latest is not None:
            (self.seed, self.at), self.latest = self.latest, None


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
        """Fit the distortion and the clusters, where the rule's interval asks for it."""
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
        """J as a (n,) mask, or None for all blocks."""
        if p >= 1:
            return None
        if self.clusters is None:
            return draw_blocks(self.n_blocks, p, generator)
        assert self.clusters.codes is not None
        assert self.clusters.centroids is not None
        return draw_clusters(self.clusters.codes, len(self.clusters.centroids), p, generator)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to make the same noise."""
        clusters = self.clusters.state() if self.clusters is not None else {}
        return {"rule": self._measures(), "fitted": self.fitted, "phi": self.phi.state(), "clusters": clusters}

    def _measures(self) -> list[Any]:
        """What of the rule decides what is measured."""
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

    def __call__(self, module: nn.Module, stored: Tensor) -> Tensor:
        """The weight as `module` reads it: noised in a training forward, else `stored` itself."""
        if not module.training or self.draw.depth == 0 or self.draw.seed is None or self.draw.muted:
            return stored
        if self.hits_of != (self.draw.seed, stored.device):
            self._draw_hits(stored)
        weight = stored
        for rule, hit in self.hits:
            weight = psi(weight, hit, rule.rule.d, rule.phi)
        if weight.requires_grad:
            weight.register_hook(self._spend)
        return weight

    def _draw_hits(self, stored: Tensor) -> None:
        """J of every rule, and what the rules measure, for the draw of now."""
        generator = torch.Generator(stored.device)
        generator.manual_seed((self.draw.seed or 0) + self.index)
        self.hits = []
        for rule in self.rules:
            p = p_at(rule.rule.p, rule.rule.schedule, self.draw.at)
            if p > 0:
                if not _in_backward():  # a layer that runs again has been fitted in its own forward
                    rule.refresh(stored, self.draw)
                self.hits.append((rule, rule.draw_hit(p, generator)))
        self.hits_of = (self.draw.seed, stored.device)

    def _spend(self, gradient: Tensor) -> None:
        self.draw.spent = True


def _ancestors(model: nn.Module, name: str) -> list[nn.Module]:
    parts = name.split(".") if name else []
    return [model, *(model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts) + 1))]


def attach_rules(model: nn.Module, rules: Sequence[NoiseRule]) -> list[Weight]:
    """Noise the weights of `model` by `rules`, in place; returns the weights that got noise.

    A weight that several rules match gets their noises one after the other, in the rules' order.

    Raises:
        UserError: the model has noise already, a rule matches nothing, or a block size does not divide.
    """
    if any("_weight_noise" in module.__dict__ for module in model.modules()):
        raise UserError("the model has noise already; call detach_noise(model) first, or give the noise once")
    weights = find_weights(model)
    matches = match_rules("noise", rules, [w.name for w in weights])
    for weight, matched in zip(weights, matches, strict=True):
        if matched:
            weight.check_ties()
        for rule in matched:
            check_block_size(weight.name, weight.module, rule.d)
    draw = NoiseDraw(model)
    watched: dict[int, nn.Module] = {}
    noised = [(w, rules_of) for w, rules_of in zip(weights, matches, strict=True) if rules_of]
    for index, (weight, matched) in enumerate(noised):
        noise = draw.weights[weight.name] = WeightNoise(draw, index, weight, matched)
        for name, module in weight.holders:
            intercept(module)
            draw.noised.append(module)
            module._weight_noise = noise  # type: ignore[assignment]
            watched.update((id(m), m) for m in _ancestors(model, name))
    for module in watched.values():
        draw.watch(module)
    model._quant_noise = draw  # type: ignore[assignment]
    return [w for w, _ in noised]


def noise_of(model: nn.Module) -> NoiseDraw | None:
    """The noise that `attach_rules` put on `model`, or None."""
    found: NoiseDraw | None = model.__dict__.get(_ATTRIBUTE)
    return found


def detach_noise(model: nn.Module) -> None:
    """Take every noise off `model`; without noise on it, nothing changes."""
    draw = model.__dict__.pop(_ATTRIBUTE, None)
    if draw is None:
        return
    for handle in draw.handles:
        handle.remove()
    for module in model.modules():
        if module.__dict__.pop("_weight_noise", None) is not None and module._modules.get("weight") is None:
            release(module)
