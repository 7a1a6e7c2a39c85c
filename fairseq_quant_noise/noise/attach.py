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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..access import intercept, release
from ..blocks import check_block_size
from ..errors import UserError
from ..plan import NoiseRule, match_rules
from ..weights import Weight, find_weights
from .distortions import DISTORTIONS
from .psi import draw_blocks, psi

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
        self.spent = True  # the current draw's backward has run
        self.handles: list[Any] = []
        self.noised: list[nn.Module] = []  # whose weights are noised
        self.seeds: dict[int, int] = {}  # random state on entering a module -> the seed of that forward
        self.latest: int | None = None  # the seed to return to after a layer has run again

    def watch(self, module: nn.Module) -> None:
        """Count `module` as running between its call and its return."""
        self.handles.append(module.register_forward_pre_hook(self._enter))
        self.handles.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if _in_backward():
            if self.depth == 0:
                self.latest = self.seed
                self.seed = self.seeds.get(_random_state(), self.seed)
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
        if self.seed is not None and module.training:
            self.seeds[_random_state()] = self.seed

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.depth = max(self.depth - 1, 0)
        if self.depth == 0 and self.latest is not None:
            self.seed, self.latest = self.latest, None


class WeightNoise:
    """The noise of one weight: rules, one after the other, each with its own J."""

    def __init__(self, draw: NoiseDraw, index: int, rules: Sequence[NoiseRule]) -> None:
        self.draw = draw
        self.index = index  # makes the J of one weight independent of another's
        self.rules = [(rule.p, rule.block_size, DISTORTIONS[rule.kind]) for rule in rules]
        self.hits: list[Tensor] = []  # J of each rule, for the seed below
        self.hits_of: tuple[int | None, torch.device | None] = (None, None)

    def __call__(self, module: nn.Module, stored: Tensor) -> Tensor:
        """The weight as `module` reads it: noised in a training forward, else `stored` itself."""
        if not module.training or self.draw.depth == 0 or self.draw.seed is None:
            return stored
        if self.hits_of != (self.draw.seed, stored.device):
            self.hits = list(self._draw_blocks(stored))
            self.hits_of = (self.draw.seed, stored.device)
        weight = stored
        for hit, (_, block_size, phi) in zip(self.hits, self.rules, strict=True):
            weight = psi(weight, hit, block_size, phi)
        if weight.requires_grad:
            weight.register_hook(self._spend)
        return weight

    def _draw_blocks(self, stored: Tensor) -> list[Tensor]:
        generator = torch.Generator(stored.device)
        generator.manual_seed((self.draw.seed or 0) + self.index)
        return [draw_blocks(stored.numel() // d, p, generator) for p, d, _ in self.rules]

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
            check_block_size(weight.name, weight.module, rule.block_size)
    draw = NoiseDraw(model)
    watched: dict[int, nn.Module] = {}
    noised = [(w, rules_of) for w, rules_of in zip(weights, matches, strict=True) if rules_of]
    for index, (weight, matched) in enumerate(noised):
        noise = WeightNoise(draw, index, matched)
        for name, module in weight.holders:
            intercept(module)
            draw.noised.append(module)
            module._weight_noise = noise  # type: ignore[assignment]
            watched.update((id(m), m) for m in _ancestors(model, name))
    for module in watched.values():
        draw.watch(module)
    model._quant_noise = draw  # type: ignore[assignment]
    return [w for w, _ in noised]


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
