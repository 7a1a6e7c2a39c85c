"""The package in four functions, for any nn.Module and without fairseq.

attach_noise(model, plan)      # before training
quantize_(model, plan)         # after it
save(model, path)              # one small file
model = load(path)             # or load(path, into=model) for a network of your own
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .artifact import Packed, pack, read, write
from .errors import DamagedFileError, UserError
from .layers import adopt_quantized
from .networks import build
from .noise import attach_rules, detach_noise, noise_of
from .plan.rules import Plan
from .quantization.quantize import quantize_
from .structure.modules import fit_stacks, keep_layers_, share_layers_, tie_layers_
from .weights.discovery import load_without_copy

__all__ = ["attach_noise", "detach_noise", "keep_layers_", "load", "noise_of", "quantize_", "save", "share_layers_"]

AnyPlan = Plan | Mapping[str, Any] | str | Path


def attach_noise(model: nn.Module, plan: AnyPlan) -> nn.Module:
    """Noise the weights of `model` by the plan's `noise` rules in every training forward; the same model comes back.

    Schedules and intervals count forwards of the model as updates, unless `noise_of(model).set_num_updates(n)` says
    which update comes; `noise_of(model).begin_epoch()` says that an epoch begins, for codebooks that are found anew
    each epoch. `noise_of(model).state_dict()` belongs in a checkpoint.

    Raises:
        UserError: the plan has no noise, or does not fit the model.
    """
    rules = Plan.of(plan).noise
    if not rules:
        raise UserError("the plan has no noise rules; add a 'noise' section")
    attach_rules(model, rules)
    return model


def save(
    model: nn.Module, path: str | Path, plan: AnyPlan | None = None, config: Mapping[str, Any] | None = None
) -> int:
    """Write `model` to one packed file; returns its bytes.

    Args:
        model: quantized, or dense.
        path: of the file, by custom `.safetensors`.
        plan: recorded in the file.
        config: how `load` can build the network (see `artifact.manifest.Manifest.model`); leave it out for your own.
    Raises:
        UserError: the file cannot be written.
    """
    return write(pack(model, Plan.of(plan) if plan is not None else None, config), path)


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


def network_of(path: str | Path, packed: Packed, into: nn.Module | None = None) -> nn.Module:
    """`load` of a file that has been read; `path` is for messages."""
    model = into if into is not None else _build(path, packed.manifest.model)
    state = packed.state_dict()
    if into is not None and packed.manifest.is_pruned:
        fit_stacks(into, state)
    tie_layers_(model, packed.manifest.layers)
    adopt_quantized(model, state)
    try:
        if into is None:
            load_without_copy(model, state)
        else:
            model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: does not fit this network ({reason}); give the network it was saved from") from None
    return model.eval()


def _build(path: str | Path, config: Mapping[str, Any]) -> nn.Module:
    """Without memory for the weights, which the file brings: a false size in the file then costs nothing."""
    if "architecture" not in config:
        raise UserError(f"{path}: holds a network of your own; build it and call load(path, into=network)")
    try:
        with torch.device("meta"):
            return build(config["architecture"], config["cfg"]["model"], config["vocab_size"], config["padding_idx"])
    except UserError:
        raise
    except Exception as error:  # the configuration came with the file and may hold anything
        raise DamagedFileError(f"{path}: its configuration is damaged ({type(error).__name__}: {error})") from None
