"""A weight held in quantized form, in place of the Parameter of a Linear, Embedding, convolution or tied softmax.

It is a module of the Parameter's name, so a checkpoint holds `….fc1.weight.codes` and so on. Every holder of a tied
weight holds the same module: quantized once, stored once, fine-tuned once. `registry.py` lists the formats.
"""

from collections.abc import Callable, MutableMapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..utils.bits import pack_bits
from ..weights.access import intercept, noise_attribute
from ..weights.discovery import Weight, find_weights
from .parts import CODES
from .registry import Format, QuantizedTensor


class QuantizedWeight(Format, nn.Module):
    """A weight of some format in a model: the dense weight's shape as its blocks lie, and what it decodes to."""

    scheme: str  # pq, int2 ... int8
    shape: torch.Size  # the dense weight's shape, (rows, …), in which a turned one has its outputs first
    full_precision: tuple[str, ...] = ()  # buffers that stay in float32, whatever the model's dtype

    def decode(self) -> Tensor:
        """The dense weight, of `shape` (rows, …), as the module that holds it should use it.

        Raises:
            NotImplementedError: the format does not override it.
        """
        raise NotImplementedError

    def multiplies(self, x: Tensor) -> bool:
        """Whether `linear` multiplies x (..., I), and faster than the decoded weight would; by default not."""
        return False

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, where `multiplies` says so: (..., I) to (..., O).

        Raises:
            NotImplementedError: the format does not override it.
        """
        raise NotImplementedError

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """`linear` where `multiplies` says so, else None."""
        return self.linear(x, bias) if self.multiplies(x) else None

    def in_integers(self, x: Tensor) -> bool:
        """Whether `linear` rounds x (..., I) to 8 bits for a product in whole numbers; by default not."""
        return False

    def has_rows(self) -> bool:
        """Whether `rows` decodes rows by themselves; by default not."""
        return False

    def facts(self) -> dict[str, Any]:
        """The fields of its `QuantizedTensor` beside scheme, shape and codebook; by default none."""
        return {}

    def parts(self) -> dict[str, Tensor]:
        """What a packed file holds of it, by the last part of the name; codes (rows, …) still a byte each.

        Raises:
            NotImplementedError: the format does not override it.
        """
        raise NotImplementedError

    def entry(self, codebook: str | None = None) -> QuantizedTensor:
        """How a packed file describes it; `codebook`: the tensor whose codebook it uses there (None: its own)."""
        return QuantizedTensor(self.scheme, tuple(self.shape), **self.facts(), codebook=codebook)

    def pack(self, entry: QuantizedTensor) -> dict[str, Tensor]:
        """`parts` with the codes packed, (bytes,) by `utils/bits.py`, as the file has them under this entry."""
        parts = self.parts()
        return parts | ({CODES: pack_bits(parts[CODES], entry.code_bits)} if CODES in parts else {})

    def shared(self) -> Tensor | None:
        """The tensor, a codebook (K, d), that other weights may hold too and a file holds once; by default None."""
        return None

    @property
    def paper_bytes(self) -> float:
        """Its size by the paper's accounting (`accounting.py`)."""
        return self.entry().paper_bytes

    @property
    def dtype(self) -> torch.dtype:
        """The decoded weight's type.

        Raises:
            NotImplementedError: the format does not override it.
        """
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(chain(self.parameters(), self.buffers())).device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedWeight":
        kept = {name: self._buffers[name] for name in self.full_precision}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


def is_multiplied(weight: Weight) -> bool:
    """Whether a holder multiplies by this weight as a matrix; an embedding looks its rows up."""
    return len(weight.shape) == 2 and any(not isinstance(module, nn.Embedding) for _, module in weight.holders)


def swap_in(weight: Weight, quantized: QuantizedWeight) -> None:
    """Put `quantized` in the place of a stored weight, for its owner and every alias; their noise ends."""
    quantized.train(weight.module.training)
    for _, module, key in weight.places:
        intercept(module, key, weight.turned)
        module._parameters.pop(key, None)
        module.__dict__.pop(noise_attribute(key), None)
        module._modules[key] = quantized


def dense_weight(weight: Weight) -> Tensor:
    """The stored Parameter, (rows, …); of a turned weight a view, as its blocks lie.

    Raises:
        UserError: the weight is quantized already.
    """
    stored = weight.stored
    if isinstance(stored, nn.Module):
        raise UserError(f"{weight.name} is quantized already; a plan may quantize a weight once")
    assert isinstance(stored, Tensor)
    return stored


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The quantized weights of `model`, each once, by the name that a plan gives it."""
    return {w.name: w.stored for w in find_weights(model) if isinstance(w.stored, QuantizedWeight)}


def code_shapes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What a state does not say of weights that are no plain matrices, by the tensor's name.

    Returns:
        `shape`, as the codes lie (O, I, k), and `turned`, whether the dense weight has its first two dimensions
        exchanged; of each weight in codes of blocks.
    """
    held = ((w, w.stored) for w in find_weights(model) if w.turned or len(w.shape) > 2)
    blocks = [w for w, stored in held if isinstance(stored, QuantizedWeight) and stored.has_codebook]
    return {w.tensor_name: {"shape": [*w.shape], "turned": w.turned} for w in blocks}


def row_major(state: MutableMapping[str, Tensor]) -> None:
    """Make the codes (rows, blocks a row) in a model's state contiguous, in place; tied ones stay one tensor."""
    laid_out: dict[int, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(f".{CODES}") and not tensor.is_contiguous():
            state[name] = laid_out.setdefault(tensor.data_ptr(), tensor.contiguous())
