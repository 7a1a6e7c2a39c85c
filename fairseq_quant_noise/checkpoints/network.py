"""A checkpoint that fairseq wrote, as a network: its configuration, its weights, its words. Needs no fairseq.

What the packed file records of a checkpoint, and the names under which the stock models go, are decided here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers import adopt_quantized
from ..networks.registry import meta_model
from ..networks.timm_weights import our_names
from ..weights.discovery import load_without_copy
from .old_names import modern_names
from .options import packed_config
from .safe_load import safe_load


@dataclass
class Trained:
    """A checkpoint's content."""

    state: dict[str, Any]  # as fairseq wrote it, but for the names of old weights
    model: nn.Module  # in plain PyTorch, under fairseq's names, with its weights; eval mode
    config: dict[str, Any]  # what a packed file records (`Manifest.model`)
    importance: dict[str, Tensor] = field(default_factory=dict)  # see `importance_in`, where it was asked for


def load_trained(path: str | Path) -> Trained:
    """The network of a fairseq checkpoint, dense or with quantized weights.

    Raises:
        UserError: not a checkpoint, an unsafe one, or of a network that is not implemented without fairseq.
    """
    return as_trained(path, read_checkpoint(path))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint as `safe_load` reads it, its weights under the names of fairseq 0.12, or of our EfficientNet."""
    state = safe_load(path)
    state["model"] = our_names(modern_names(state["model"]))
    return state


def as_trained(path: str | Path, state: dict[str, Any]) -> Trained:
    """`load_trained` of a checkpoint that has been read; `path` is for messages."""
    config = packed_config(path, state)
    model = bare_network(config)
    weights: dict[str, Tensor] = state["model"]
    adopt_quantized(model, weights)
    _check_finite(path, weights)
    try:
        load_without_copy(model, weights)
    except RuntimeError as error:
        raise UserError(f"checkpoint {path}: does not fit its own configuration ({_first_line(error)})") from None
    return Trained(state, model.eval(), config)


def bare_network(config: Mapping[str, Any]) -> nn.Module:
    """The network that a packed file's configuration describes, without memory for its weights."""
    return meta_model(config["architecture"], config["cfg"]["model"], config["vocab_size"], config["padding_idx"])


def _check_finite(path: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Refuse what no quantization and no pruning makes good. Raises UserError, naming the tensor."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"checkpoint {path}: {name} holds NaN or infinity; give a checkpoint from before the training diverged"
            )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else lines[0]
