"""Offer the package in four functions, for any nn.Module and without fairseq.

attach_noise(model, plan)      # before training
quantize_(model, plan)         # after it
save(model, path)              # one small file
model = load(path)             # or load(path, into=model) for a network of your own
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from .artifact import pack, read, write
from .artifact.network import network_of
from .errors import UserError
from .layers import warn_of_unrounded
from .noise import attach_rules, detach_noise, noise_of
from .plan.plan import Plan
from .plan.rules import Dense
from .quantization.quantize import quantize_
from .quantization.targets import resolve_stages
from .structure.learned_rates import learn_layerdrop_
from .structure.modules import keep_layers_, share_layers_
from .utils.ranks import check_whole

__all__ = [
    "attach_noise",
    "detach_noise",
    "keep_layers_",
    "learn_layerdrop_",
    "load",
    "noise_of",
    "quantize_",
    "save",
    "share_layers_",
]

AnyPlan = Plan | Mapping[str, Any] | str | Path


def attach_noise(model: nn.Module, plan: AnyPlan, *, strict: bool = False) -> nn.Module:
    """Add the noise of the plan's `noise` rules to the weights of `model` in every training forward; returns `model`.

    A matrix of a module of a type that no rule can name stays as it is; a warning names it, or with `strict` an error.
    So it is with a weight of the plan's stages whose inputs `activations` cannot round.

    Schedules and intervals count forwards of the model as updates, unless `noise_of(model).set_num_updates(n)` says
    which update comes; `noise_of(model).begin_epoch()` says that an epoch begins, for codebooks that are found anew
    each epoch. `noise_of(model).state_dict()` belongs in a checkpoint.

    Raises:
        UserError: the plan has no noise, or does not fit the model.
    """
    plan = Plan.of(plan)
    if not plan.noise:
        raise UserError("the plan has no noise rules; add a 'noise' section")
    if plan.activations is not None and plan.stages:
        warn_of_unrounded(model, (t.weight.name for t in resolve_stages(plan, model)), strict)
    attach_rules(model, plan.noise, strict=strict)
    return model


def save(
    model: nn.Module,
    path: str | Path,
    plan: AnyPlan | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    dense: str | None = None,
) -> int:
    """Write `model` to one packed file; returns its bytes.

    Args:
        model: quantized, or dense.
        path: where to write; its name should end in `.safetensors`.
        plan: the plan that quantized the model, recorded in the file.
        config: how `load` can build the network (see `artifact.manifest.Manifest.model`); leave it out for your own.
        dense: how tensors without codes are stored, in the place of the plan's `dense`: fp32 (the default of a plan),
            or fp16 where every value survives.

    Raises:
        UserError: `dense` is neither; the file cannot be written, or `load` would refuse it; or the model is sharded.
    """
    check_whole(model.named_parameters(), "save")
    the_plan = Plan.of(plan) if plan is not None else None
    if dense is not None:
        the_plan = replace(the_plan or Plan(), dense=Dense(dense))
    return write(pack(model, the_plan, config), path)


def load(path: str | Path, into: nn.Module | None = None) -> nn.Module:
    """The network of a packed file, in eval mode, in plain PyTorch.

    Args:
        path: of the file.
        into: a dense network to load into, for files whose network this package cannot build by itself.

    Raises:
        UserError: there is no such file, or `into` is needed or does not fit.
        DamagedFileError: the file is not whole.
    """
    return network_of(path, read(path), into)
