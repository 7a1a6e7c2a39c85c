"""Build the network that a packed file describes, and give it the file's weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import DamagedFileError, UserError
from ..layers import adopt_quantized
from ..networks.hugging_face import is_theirs, state_for
from ..networks.registry import PREFIX, NoNetworkError, meta_model
from ..structure.modules import fit_stacks, tie_layers_
from ..weights.discovery import load_without_copy
from . import Packed


def network_of(path: str | Path, packed: Packed, into: nn.Module | None = None) -> nn.Module:
    """Build the network of a packed file that has been read, in eval mode; `api.load` without the reading.

    Args:
        path: of the file, for messages.
        packed: its content.
        into: a dense network to load into, or None to build the one that the file describes. For the file of a fairseq
            RoBERTa, it may be a RoBERTa of transformers too.

    Raises:
        UserError: the file holds a network of the user's own and `into` is None, or its weights do not fit the network.
        DamagedFileError: no network can be built from its configuration.
    """
    model = into if into is not None else _build(path, packed.manifest.model)
    state = packed.state_dict()
    if into is not None and _needs_renaming(packed, into):
        state = _for_hugging_face(path, packed, into)
    else:
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
        raise _misfit(path, str(error).splitlines()[-1].strip()) from None
    return model.eval()


def _needs_renaming(packed: Packed, into: nn.Module) -> bool:
    """Whether `into` is a network of transformers, and the file one of fairseq's."""
    return str(packed.manifest.model.get("architecture", "")).startswith(f"{PREFIX}roberta") and is_theirs(into)


def _for_hugging_face(path: str | Path, packed: Packed, into: nn.Module) -> dict[str, Tensor]:
    """The file's state under the names of transformers. Raises UserError where `into` is of another kind."""
    try:
        return state_for(into, packed.state_dict(), packed.manifest.model["cfg"]["model"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def check_network(path: str | Path, packed: Packed) -> nn.Module:
    """Refuse a file whose tensors are not, by name and shape, those of the network that it describes.

    It costs neither memory for that network nor a look at a weight.

    Returns:
        The network, dense and without ties, on the meta device.

    Raises:
        UserError: the file has other tensors, or holds a network of the user's own.
        DamagedFileError: its configuration describes no network.
    """
    model = _build(path, packed.manifest.model)
    there, expected = packed.shapes(), {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    reasons = [
        f"{name}: {_shape(there.get(name))} in the file, {_shape(expected.get(name))} in the network that it describes"
        for name in sorted(there.keys() | expected.keys())
        if there.get(name) != expected.get(name)
    ]
    unknown = packed.manifest.inputs.keys() - dict(model.named_modules()).keys()
    reasons += [f"{name}: rounds its input, and is not in the network" for name in sorted(unknown)]
    if reasons:
        raise _misfit(path, reasons[0])
    return model


def _shape(shape: tuple[int, ...] | None) -> str:
    return "not" if shape is None else f"of shape {shape}"


def _misfit(path: str | Path, reason: str) -> UserError:
    return UserError(f"{path}: does not fit this network ({reason}); give the network it was saved from")


def _build(path: str | Path, config: Mapping[str, Any]) -> nn.Module:
    """The network that the file describes, on the meta device: the file brings the weights."""
    if "architecture" not in config:
        raise UserError(f"{path}: holds a network of your own; build it and call load(path, into=network)")
    try:
        return meta_model(config["architecture"], config["cfg"]["model"], config["vocab_size"], config["padding_idx"])
    except (NoNetworkError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{path}: its configuration is damaged ({error})") from None
