"""Represent a fairseq checkpoint as one object: read once, its options resolved once. Needs no fairseq."""

import io
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers import adopt_quantized
from ..layers.registry import Held, weights_in
from ..networks.registry import meta_model
from ..networks.timm_weights import our_names
from ..quantization.importance import sound
from ..structure.learned_rates import without_scores
from ..utils.files import replace_file
from ..weights.discovery import load_without_copy
from .keys import IMPORTANCE, SHAPES, STAGES
from .moments import moments_in
from .old_names import modern_names
from .options import packed_config
from .safe_load import safe_load


class Checkpoint:
    """A checkpoint, dense or with quantized weights. Each property is worked out when it is first asked for, and kept.

    Args:
        path: of the file; for messages alone where `state` is given.
        state: the content, where it has been read or made.
    """

    def __init__(self, path: str | Path, state: dict[str, Any] | None = None) -> None:
        self.path = path
        if state is not None:
            self.state = state

    @cached_property
    def state(self) -> dict[str, Any]:
        """The content as `safe_load` reads it, weights under the names of fairseq 0.12, or of our EfficientNet.

        Raises:
            UserError: the file is not a checkpoint.
            DamagedFileError: the checkpoint is not whole, or is unsafe.
        """
        state = safe_load(self.path)
        state["model"] = our_names(modern_names(state["model"]))
        return state

    @property
    def weights(self) -> dict[str, Tensor]:
        """The model's state by name: dense tensors in their own shapes, and the parts of quantized weights.

        The parts' shapes are those of `Packed.state_dict`, such as NAME.codes (rows, blocks per row).
        """
        weights: dict[str, Tensor] = self.state["model"]
        return weights

    @property
    def stages(self) -> dict[str, Any]:
        """The `plan`, how many stages are `done` and where they start, of a training with stages; else empty."""
        return (self.state.get("extra_state") or {}).get(STAGES) or {}

    @property
    def shapes(self) -> tuple[dict[str, tuple[int, ...]], set[str]]:
        """Of the weights in codes that are no plain matrices: the shapes as codes lie, and the names of turned ones."""
        found = (self.state.get("extra_state") or {}).get(SHAPES)
        held = {name: held for name, held in weights_in(self.weights).items() if isinstance(held, Held)}
        shapes, turned = {}, set()
        for name, entry in found.items() if isinstance(found, Mapping) else ():
            sizes: Any = entry.get("shape") if isinstance(entry, Mapping) else None
            numbers = isinstance(sizes, list) and all(type(size) is int and size > 0 for size in sizes)
            if name in held and numbers and math.prod(sizes) == math.prod(held[name].shape):
                shapes[name] = tuple(sizes)
                turned |= {name} if entry.get("turned") is True else set()
        return shapes, turned

    @cached_property
    def config(self) -> dict[str, Any]:
        """How to build the network, as a packed file records it (`Manifest.model`).

        Raises:
            UserError: there is no configuration, or this package does not know its model.
        """
        return packed_config(self.path, self.state)

    @cached_property
    def network(self) -> nn.Module:
        """The network in plain PyTorch, under fairseq's names, in eval mode; it uses the memory of `weights`.

        Raises:
            UserError: as `config`; or the weights do not fit it, or are not finite.
        """
        model = self._adopted()
        _check_finite(self.path, self.weights)
        try:
            load_without_copy(model, without_scores(self.weights))
        except RuntimeError as error:
            reason = _first_line(error)
            raise UserError(f"checkpoint {self.path}: does not fit its own configuration ({reason})") from None
        return model.eval()

    @cached_property
    def moments(self) -> dict[str, Tensor]:
        """Adam's second moments of the dense weights, by the weight's name; empty where there are none.

        They are those that pruning, sharing or a stage kept in the checkpoint, or else those of the optimizer, if the
        network is known. Each has its weight's shape: (out, in) for a Linear, (words, C) for an Embedding.
        """
        found: object = (self.state.get("extra_state") or {}).get(IMPORTANCE)
        if found is None:
            try:
                found = moments_in(self.state, self._adopted())
            except UserError:
                return {}
        return sound(found, self.weights)

    def _adopted(self) -> nn.Module:
        """The network on the meta device, with a place for each quantized weight."""
        config = self.config
        options, words = config["cfg"]["model"], config["vocab_size"]
        model = meta_model(config["architecture"], options, words, config["padding_idx"])
        adopt_quantized(model, self.weights)
        return model

    def forget_optimizer(self) -> None:
        """Free the optimizer's state, which takes twice the memory of the weights; read `moments` first."""
        self.state = {**self.state, "last_optimizer_state": None}

    def write(self, path: str | Path) -> None:
        """Write the content to `path`, whole or not at all.

        Raises:
            UserError: `path` cannot be written.
        """
        buffer = io.BytesIO()
        torch.save(dict(self.state), buffer)
        replace_file(path, buffer.getvalue())


def _check_finite(path: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that are NaN or infinite. Raises UserError, naming the tensor."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"checkpoint {path}: {name} holds NaN or infinity; give a checkpoint from before the training diverged"
            )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else lines[0]
