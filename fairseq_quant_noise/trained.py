"""A checkpoint that fairseq wrote, as a network: its configuration, its weights, its words. Needs no fairseq.

What the packed file records of a checkpoint, and the names under which the stock models go, are decided here.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError
from .layers import adopt_quantized
from .layers.pq import CODES
from .networks import build
from .safe_load import safe_load

PREFIX = "quant_noise_"  # of this package's names for fairseq's models
MODELS = ("transformer_lm",)  # fairseq's names of the models that this package knows

#: What a packed file keeps of fairseq's configuration: enough to evaluate. Paths of the machine that trained it go.
_SECTIONS = ("model", "task", "criterion")
#: Options of other sections that a criterion's defaults refer to, as ${optimization.sentence_avg}.
_REFERRED = {"optimization": ("sentence_avg",), "distributed_training": ("ddp_backend",), "common": ("tpu",)}
#: fairseq's options that say how much noise a training has.
NOISE_FLAGS = ("quant_noise_pq", "quant_noise_scalar")
FAIRSEQ_NOISE_OPTIONS = (*NOISE_FLAGS, "quant_noise_pq_block_size")
_MACHINE = {"data": "", "plasma_path": ""}


@dataclass
class Trained:
    """A checkpoint's content."""

    state: dict[str, Any]  # as fairseq wrote it
    model: nn.Module  # in plain PyTorch, under fairseq's names, with its weights; eval mode
    config: dict[str, Any]  # what a packed file records (`Manifest.model`)


def load_trained(path: str | Path) -> Trained:
    """The network of a fairseq checkpoint, dense or with quantized weights.

    Raises:
        UserError: not a checkpoint, an unsafe one, or of a network that is not implemented without fairseq.
    """
    state = safe_load(path)
    config = packed_config(path, state)
    model = build(config["architecture"], config["cfg"]["model"], config["vocab_size"], config["padding_idx"])
    weights: dict[str, Tensor] = state["model"]
    adopt_quantized(model, weights)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"checkpoint {path}: does not fit its own configuration ({_first_line(error)})") from None
    return Trained(state, model.eval(), config)


def packed_config(path: str | Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """How to build the checkpoint's network, as a packed file records it.

    Raises:
        UserError: the checkpoint has no configuration, or no embedding that tells its vocabulary.
    """
    cfg = _configuration(path, state)
    kept = {name: dict(cfg[name]) for name in _SECTIONS if isinstance(cfg.get(name), Mapping)}
    model = kept["model"]
    architecture = PREFIX + stock_name(path, str(model.get("_name") or model.get("arch")))
    model["_name"] = architecture
    model.update({name: 0 for name in NOISE_FLAGS if model.get(name)})  # the file is evaluated, not trained
    if "criterion" in kept:
        kept["criterion"] = unwrapped(kept["criterion"])
    for referred, names in _REFERRED.items():
        kept[referred] = {name: cfg[referred][name] for name in names if name in (cfg.get(referred) or {})}
    for section in kept.values():
        section.update({k: v for k, v in _MACHINE.items() if k in section})
    vocab = vocabulary_size(state["model"])
    if vocab is None:
        raise UserError(f"checkpoint {path}: has no decoder.embed_tokens; only language models can be packed so far")
    return {"architecture": architecture, "cfg": kept, "vocab_size": vocab, "padding_idx": 1}


def _configuration(path: str | Path, state: Mapping[str, Any]) -> Mapping[str, Any]:
    cfg = state.get("cfg")
    if isinstance(cfg, Mapping) and cfg.get("model") is not None:
        return cfg
    args = state.get("args")
    if args is None:
        raise UserError(
            f"checkpoint {path}: holds no configuration ('cfg' or 'args'); give one that fairseq-train wrote"
        )
    options = {k: v for k, v in vars(args).items() if isinstance(v, str | int | float | bool | list | type(None))}
    return {
        "model": options | {"_name": options.get("arch")},
        "task": options | {"_name": options.get("task")},
        "criterion": options | {"_name": options.get("criterion")},
    }


def unwrapped(criterion: Mapping[str, Any]) -> dict[str, Any]:
    """A criterion's configuration; of `ipq` the one it wraps, for evaluation needs neither its teacher nor its name."""
    if criterion.get("_name") != "ipq":
        return dict(criterion)
    options = json.loads(criterion.get("ipq_criterion_options") or "{}")
    return {**options, "_name": criterion["ipq_criterion"]}


def stock_name(path: str | Path, name: str) -> str:
    """fairseq's own name of the model behind a model's or an architecture's name.

    A checkpoint's configuration holds every option, so that the architecture, which only sets defaults, can go.

    Raises:
        UserError: a model that this package does not know.
    """
    bare = name.removeprefix(PREFIX)
    for model in MODELS:
        if bare == model or bare.startswith(f"{model}_"):
            return model
    raise UserError(f"{path}: model {name!r} cannot be compressed here; known models: {', '.join(MODELS)}")


def vocabulary_size(state: Mapping[str, Tensor]) -> int | None:
    """How many words the embedding of a language model holds, adaptive bands added up; None without one."""
    embedding = re.compile(rf"decoder\.embed_tokens\.(embeddings\.\d+\.0\.)?weight(\.{CODES})?")
    rows = [tensor.shape[0] for name, tensor in state.items() if embedding.fullmatch(name)]
    return sum(rows) if rows else None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else lines[0]


def meta_model(architecture: str, options: Mapping[str, Any], vocab_size: int) -> nn.Module:
    """The network of an architecture without memory for its weights, for sizes."""
    with torch.device("meta"):
        return build(architecture, options, vocab_size)
