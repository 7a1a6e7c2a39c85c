"""Attach noise to a model's weights, wherever a training forward reads them, and detach it."""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..errors import UserError
from ..plan.matching import match_rules
from ..plan.rules import NoiseRule
from ..weights.access import intercept, noise_attribute, noises, remove_noises
from ..weights.blocks import check_block_size, fitting_block_size
from ..weights.discovery import Weight, find_weights, warn_of_uncovered
from .model_noise import ModelNoise
from .statistics import CleanStatistics
from .weight_noise import WeightNoise

logger = logging.getLogger(__name__)

_WORTH_A_WORD = 0.01  # the least share of the noised weights that a warning is given for
_ATTRIBUTE = "_quant_noise"  # on the root module: its ModelNoise


def _ancestors(model: nn.Module, name: str) -> list[nn.Module]:
    parts = name.split(".") if name else []
    return [model, *(model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts) + 1))]


def attach_rules(model: nn.Module, rules: Sequence[NoiseRule], *, strict: bool = False) -> list[Weight]:
    """Noise the weights of `model` by `rules`, in place; returns the weights that got noise.

    A weight that several rules match gets their noises one after the other, in the rules' order.

    Raises:
        UserError: the model has noise already, a rule matches nothing, a block size does not divide, the model has a
            matrix that no rule can name (with `strict`, else a warning says so), or a noised weight is held where
            nothing can intercept it (`Weight.check_ties`).
    """
    if any(noises(module) for module in model.modules()):
        raise UserError("the model has noise already; call detach_noise(model) first, or give the noise once")
    weights = find_weights(model)
    found = match_rules("noise", rules, [w.name for w in weights])
    matches = [[rule.of_weight(w.name, w.module) for rule in of] for w, of in zip(weights, found, strict=True)]
    for weight, matched in zip(weights, matches, strict=True):
        if matched:
            weight.check_ties()
        for rule in matched:
            check_block_size(weight.name, weight.shape, rule.d)
    warn_of_uncovered(model, strict)
    draw = ModelNoise(model)
    watched: dict[int, nn.Module] = {}
    noised = [(w, rules_of) for w, rules_of in zip(weights, matches, strict=True) if rules_of]
    for index, (weight, matched) in enumerate(noised):
        noise = draw.weights[weight.name] = WeightNoise(draw, index, weight, matched)
        for path, module, key in weight.places:
            intercept(module, key, weight.turned)
            draw.noised.append(module)
            module.__dict__[noise_attribute(key)] = noise
            watched.update((id(m), m) for m in _ancestors(model, path))
    for module in watched.values():
        draw.watch(module)
    CleanStatistics(model, draw)
    _warn_of_zeroed_convolutions(noised)
    model._quant_noise = draw  # type: ignore[assignment]
    return [w for w, _ in noised]


def _warn_of_zeroed_convolutions(noised: Sequence[tuple[Weight, Sequence[NoiseRule]]]) -> None:
    """Log one warning where proxy noise hits convolutions: pq costs training less (docs/noise.md)."""
    sizes = {weight.name: math.prod(weight.shape) for weight, _ in noised}
    zeroed = [
        weight.name
        for weight, rules in noised
        if len(weight.shape) > 2 and any("proxy" in rule.kinds and rule.p for rule in rules)
    ]
    share = sum(sizes[name] for name in zeroed) / max(sum(sizes.values()), 1)
    if share > _WORTH_A_WORD:
        logger.warning(
            f"proxy noise zeroes blocks of convolutions ({share:.0%} of the noised weights; {zeroed[0]} is the first), "
            "and training loses accuracy by it; if too much, kind pq loses less (--quant-noise-kind pq, or kind: pq in "
            "the plan)"
        )


def fitted_rules(model: nn.Module, rules: Sequence[NoiseRule]) -> list[NoiseRule]:
    """Rules over every weight, each split by the block sizes that the weights of a network of convolutions need.

    No one size divides 1x1, 3x3 and 5x5 kernels (`blocks.fitting_block_size`). Other networks keep the one given.

    Args:
        model: any network.
        rules: without patterns, as the command line's options make them.
    """
    weights = find_weights(model)
    if all(len(weight.shape) == 2 for weight in weights):
        return list(rules)
    fitted = []
    for rule in rules:
        sizes: dict[int, list[str]] = {}
        for weight in weights:
            sizes.setdefault(fitting_block_size(weight.shape, rule.d), []).append(re.escape(weight.name))
        split = [replace(rule, match="|".join(names), block_size=size) for size, names in sizes.items()]
        fitted += split if rule.d > 1 else [rule]
    return fitted


def noise_of(model: nn.Module) -> ModelNoise | None:
    """The noise that `attach_rules` put on `model`, or None."""
    found: ModelNoise | None = model.__dict__.get(_ATTRIBUTE)
    return found


def detach_noise(model: nn.Module) -> None:
    """Take every noise off `model`; without noise on it, nothing changes."""
    draw = model.__dict__.pop(_ATTRIBUTE, None)
    if draw is None:
        return
    for handle in draw.handles:
        handle.remove()
    for module in model.modules():
        remove_noises(module)
