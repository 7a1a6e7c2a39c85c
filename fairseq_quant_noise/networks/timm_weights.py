"""Rename EfficientNet's weights between timm's names and ours, and load files of weights."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, is_about_a_file
from .efficientnet import EfficientNet

_THEIRS = re.compile(r"blocks\.(\d+)\.(\d+)\.")

_OURS = re.compile(r"blocks\.(\d+)\.(?:first|layers\.(\d+))\.")

#: Names of the package efficientnet-pytorch, in which the published EfficientNet-Lites come: `_blocks.3._bn2.weight`. A
#: block without expansion, which has no `_expand_conv`, is the first of timm's depthwise separable ones.
_FLAT = re.compile(r"_blocks\.(\d+)\._(\w+)\.(\w+)")
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_SEPARABLE = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
_INVERTED = {
    **_SEPARABLE,
    "expand_conv": "conv_pw",
    "project_conv": "conv_pwl",
    "bn0": "bn1",
    "bn1": "bn2",
    "bn2": "bn3",
}

#: Keys under which timm's checkpoints keep the weights, in the order in which timm itself looks.
_PLACES = ("state_dict_ema", "model_ema", "state_dict", "model")


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state of this package's EfficientNet to timm's names; any other state comes back as it is.

    Args:
        state: tensors of any shape, such as `conv_stem.weight` (channels, 3, 3, 3); they are passed on, not copied.
    """
    return {_their_name(name): tensor for name, tensor in state.items()}


def _their_name(name: str) -> str:
    return _OURS.sub(lambda found: f"blocks.{found[1]}.{0 if found[2] is None else int(found[2]) + 1}.", name)


def our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state of timm's EfficientNet to this package's names; any other state comes back as it is.

    Args:
        state: tensors of any shape, such as `conv_stem.weight` (channels, 3, 3, 3); they are passed on, not copied.
    """

    def renamed(found: re.Match[str]) -> str:
        stage, block = found[1], int(found[2])
        return f"blocks.{stage}.layers.{block - 1}." if block else f"blocks.{stage}.first."

    return {_THEIRS.sub(renamed, name): tensor for name, tensor in state.items()}


def staged_names(state: Mapping[str, Tensor], blocks: Sequence[int]) -> dict[str, Tensor]:
    """Rename a state of efficientnet-pytorch's EfficientNet-Lite to timm's names; any other comes back as it is.

    Args:
        state: tensors of any shape; they are passed on, not copied.
        blocks: of each stage, how many blocks it has: that package numbers them without stages.
    """
    places = [(stage, block) for stage, count in enumerate(blocks) for block in range(count)]

    def renamed(name: str) -> str:
        if (found := _FLAT.fullmatch(name)) and int(found[1]) < len(places):
            stage, block = places[int(found[1])]
            expands = f"_blocks.{found[1]}._expand_conv.weight" in state
            part = (_INVERTED if expands else _SEPARABLE).get(found[2])
            return f"blocks.{stage}.{block}.{part}.{found[3]}" if part else name
        first, _, rest = name.partition(".")
        return f"{_OUTSIDE[first]}.{rest}" if first in _OUTSIDE else name

    return {renamed(name): tensor for name, tensor in state.items()}


def load_timm_weights(model: EfficientNet, path: str | Path) -> None:
    """Load the weights of timm's EfficientNet of the same shape from a local file.

    Args:
        model: a classifier for another number of classes than the file's stays as it is. A Lite also takes the names
            of the package efficientnet-pytorch, whose other networks pad differently from timm's.
        path: of a `.safetensors` file, or of a state dict that torch.save wrote.

    Raises:
        UserError: the file does not exist, holds no state dict, or is of another network; the message then names the
            first tensor that does not fit.
    """
    state = read_weights(path)
    if model.lite:
        state = staged_names(state, model.depths)
    state, ours = our_names(state), model.state_dict()
    if any(key in state and state[key].shape != ours[key].shape for key in ("classifier.weight", "classifier.bias")):
        state |= {key: ours[key] for key in ("classifier.weight", "classifier.bias")}
    counts = {name: t for name, t in ours.items() if name.endswith("num_batches_tracked")}  # some files lack them
    problem = _mismatch({**counts, **state}, ours)
    if problem:
        raise UserError(f"{path}: {problem}; give the weights of the EfficientNet that --arch names")
    nn.Module.load_state_dict(model, {**counts, **state})


def _mismatch(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str | None:
    """The first tensor, by timm's name, that only one of the two has, or that differs in shape; None where all fit."""
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            return f"lacks {_their_name(name)}, which this network has"
        if name not in ours:
            return f"has {_their_name(name)}, which this network lacks"
        if theirs[name].shape != ours[name].shape:
            return (
                f"its {_their_name(name)} is {tuple(theirs[name].shape)}, and this network's {tuple(ours[name].shape)}"
            )
    return None


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict in a file of timm's weights without running code in it.

    Returns:
        Tensors by name, in the shapes of the file, such as `conv_stem.weight` (channels, 3, 3, 3).

    Raises:
        UserError: the file cannot be read, or holds no state dict.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch

            found: Any = safetensors.torch.load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if not is_about_a_file(error):
            raise
        raise UserError(f"{path}: {error.strerror or error}; give the file of timm's weights") from None
    except Exception as error:  # torch and safetensors raise many kinds for a file that they cannot read
        line = str(error).splitlines()[0]
        raise UserError(f"{path}: not a file of weights ({line}); give a state dict or a .safetensors file") from None
    for place in _PLACES:
        if isinstance(found, Mapping) and isinstance(found.get(place), Mapping):
            found = found[place]
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()) or not found:
        raise UserError(f"{path}: holds no state dict of tensors; give the file of timm's weights")
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()}
