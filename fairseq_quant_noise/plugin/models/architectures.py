"""Compute the options of a registered architecture, for the dry run."""

import argparse
import difflib
import re
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import yaml
from fairseq.models import (
    ARCH_CONFIG_REGISTRY,
    ARCH_MODEL_NAME_REGISTRY,
    MODEL_DATACLASS_REGISTRY,
    MODEL_REGISTRY,
)
from torch import nn

from ...errors import UserError
from ...networks.registry import PREFIX
from .layers import layers_of


def architecture_options(architecture: str, settings: Sequence[str] = (), heads: Sequence[str] = ()) -> dict[str, Any]:
    """fairseq's `cfg.model` for `--arch architecture` and the given options of the model.

    Args:
        architecture: a registered name.
        settings: options as KEY=VALUE, by the names that Hydra knows.
        heads: classification heads as NAME=CLASSES; their inner width is the embedding's, as the tasks make them.

    Raises:
        UserError: the architecture, an option or a value does not exist, or a model without heads is given one.
    """
    if architecture not in ARCH_CONFIG_REGISTRY:
        ours = [name for name in ARCH_CONFIG_REGISTRY if name.startswith(PREFIX)]
        near = ", ".join(difflib.get_close_matches(architecture, ours, n=4, cutoff=0.0))
        raise UserError(f"--arch {architecture}: not registered; the nearest here are {near}; docs/tasks.md lists all")
    model = ARCH_MODEL_NAME_REGISTRY[architecture]
    dataclass = MODEL_DATACLASS_REGISTRY.get(model)
    defaults = {name: field.default for name, field in getattr(dataclass, "__dataclass_fields__", {}).items()}
    options = Namespace(**_given(architecture, settings, [n for n in defaults if n != "_name"]))
    ARCH_CONFIG_REGISTRY[architecture](options)
    layers_of(options)
    plain = {name: value for name, value in defaults.items() if not str(value).startswith("${")}
    named = _heads(architecture, heads)
    extra = {"classification_heads": {n: [options.encoder_embed_dim, k] for n, k in named.items()}} if named else {}
    return {**plain, **vars(options), "_name": model, **extra}


def _given(architecture: str, settings: Sequence[str], fields: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(add_help=False)
    MODEL_REGISTRY[ARCH_MODEL_NAME_REGISTRY[architecture]].add_args(parser)
    actions: dict[str, Any] = {**dict.fromkeys(fields), **{action.dest: action for action in parser._actions}}
    given = {}
    for setting in settings:
        name, sign, text = setting.partition("=")
        key = name.replace("-", "_")
        if not sign:
            raise UserError(f"--set {setting}: give KEY=VALUE, such as max_positions=512")
        if key not in actions:
            near = difflib.get_close_matches(key, actions, n=1, cutoff=0.0)[0]
            raise UserError(f"--set {setting}: {architecture} has no option {name!r}; the nearest is {near}")
        given[key] = _value(setting, text, actions[key])
    return given


def _value(setting: str, text: str, action: Any) -> Any:
    """Convert the text as fairseq-train does; a switch takes true or false, and options without an action are YAML."""
    if action is not None and action.nargs == 0:
        if text.lower() not in ("true", "false"):
            raise UserError(f"--set {setting}: give true or false")
        return text.lower() == "true"
    convert = yaml.safe_load if action is None else action.type or str
    try:
        value = convert(text)
    except Exception:  # fairseq's converters evaluate the text
        raise UserError(f"--set {setting}: not a value of this option ({convert.__name__})") from None
    if action is not None and action.choices and value not in action.choices:
        raise UserError(f"--set {setting}: give one of {', '.join(map(str, action.choices))}")
    return value


def _heads(architecture: str, heads: Sequence[str]) -> dict[str, int]:
    """Parse `--head NAME=CLASSES` into the number of classes by name."""
    if heads and not hasattr(MODEL_REGISTRY[ARCH_MODEL_NAME_REGISTRY[architecture]], "register_classification_head"):
        raise UserError(f"--head {heads[0]}: {architecture} has no classification heads; leave it out")
    named: dict[str, int] = {}
    for head in heads:
        found = re.fullmatch(r"([^.=]+)=0*([1-9][0-9]*)", head)
        if found is None or hasattr(nn.ModuleDict(), found[1]):
            raise UserError(f"--head {head}: give NAME=CLASSES, such as mnli=3")
        if found[1] in named:
            raise UserError(f"--head {head}: there is a head {found[1]!r} already; give each name once")
        named[found[1]] = int(found[2])
    return named
