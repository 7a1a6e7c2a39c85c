"""Turn a model into the tensors and the manifest of a packed file, and these into the state that a model loads."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..layers import QuantizedWeight, input_quantizers
from ..layers.inputs import NAME as INPUT_QUANTIZER
from ..layers.inputs import InputQuantizer
from ..layers.registry import QuantizedTensor, all_file_parts
from ..plan.plan import Plan
from ..structure.state import layer_ties, maps_and_ties
from ..utils.halves import halved
from ..weights.discovery import find_weights
from .manifest import HALVED, Manifest


@dataclass(frozen=True)
class Packed:
    """The content of a packed file: tensors by the file's names, with codes packed and tied copies left out."""

    tensors: dict[str, Tensor]
    manifest: Manifest

    def state_dict(self) -> dict[str, Tensor]:
        """The state that the quantized model loads: codes unpacked, centroids in fp32, tied copies filled in.

        Returns:
            By name, dense tensors in their own shape and type, and the parts of each quantized tensor NAME. Of scheme
            pq: NAME.codes (rows, blocks per row) uint8, int32 where K is above 256, and NAME.centroids (K, d) float32,
            with int8 centroids also NAME.file_affine (2, 1) float32 and NAME.centroid_bits () uint8, with a shared
            codebook NAME.codebook () int32. Of intN: NAME.codes uint8 in the dense shape, NAME.affine (2, 1 or
            channels) float32 and NAME.scalar (2,) uint8; codes of a transposed tensor have the outputs first. Of a
            module with rounded inputs: MODULE.input_quantizer.range (2,), .seen () and .spec (3,).
        """
        state = {name: self.dense(name) for name in self.dense_names}
        parts = {name: [""] for name in state}  # what a logical tensor's entries are called after its name
        for name, entry in self.manifest.tensors.items():
            found = {f".{part}": tensor for part, tensor in self._quantized_state(name, entry).items()}
            parts[name] = [*found]
            state.update({name + part: tensor for part, tensor in found.items()})
        for copy, owner in self.ties.items():
            state.update({copy + part: state[owner + part] for part in parts[owner]})
        for name, inputs in self.manifest.inputs.items():
            quantizer = InputQuantizer(inputs["bits"], "tensor", 1)
            quantizer.range.copy_(torch.tensor([inputs["low"], inputs["high"]]))
            quantizer.seen.fill_(1)
            prefix = f"{name}." if name else ""
            state |= {f"{prefix}{INPUT_QUANTIZER}.{key}": value for key, value in quantizer.state_dict().items()}
        return state

    @cached_property
    def ties(self) -> dict[str, str]:
        """Tied copy -> the tensor in store, those of shared layers included."""
        stored = [*self.manifest.tensors, *self.dense_names]
        return {**self.manifest.ties, **layer_ties(self.manifest.layers, stored)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of the dense model, tied copies included."""
        stored = {name: tuple(entry.dense_shape) for name, entry in self.manifest.tensors.items()}
        stored |= {name: tuple(self.tensors[name].shape) for name in self.dense_names}
        return stored | {copy: stored[owner] for copy, owner in self.ties.items()}

    @cached_property
    def _shared(self) -> dict[str, int]:
        """The number of each codebook that several tensors use, by the tensor that stores it."""
        owners = {entry.codebook for entry in self.manifest.tensors.values()}
        return {name: number for number, name in enumerate(self.manifest.tensors) if name in owners}

    @cached_property
    def dense_names(self) -> list[str]:
        """The tensors that are stored as they are."""
        inside = {part for name in self.manifest.tensors for part in self.parts(name)}
        return [name for name in self.tensors if name not in inside]

    def dense(self, name: str) -> Tensor:
        """A tensor without codes, by its name in the file, in its own shape and type."""
        stored = self.tensors[name]
        return stored.float() if self.is_halved(name) else stored

    def is_halved(self, name: str) -> bool:
        """Whether the tensor of this name has no codes, is stored in fp16 and stands for one in fp32."""
        halved = bool(self.manifest.dense) and name not in self.manifest.tensors
        return halved and self.tensors[name].dtype == torch.float16

    def parts(self, name: str) -> list[str]:
        """The entries in the file of the tensor `name`."""
        if name not in self.manifest.tensors:
            return [name]
        return [f"{name}.{part}" for part in all_file_parts() if f"{name}.{part}" in self.tensors]

    def tensor_bytes(self, name: str) -> int:
        """Bytes in the file of the tensor `name`: of codes and what they need of their own, or of the dense tensor."""
        return sum(self.tensors[part].numel() * self.tensors[part].element_size() for part in self.parts(name))

    def parts_of(self, name: str) -> dict[str, Tensor]:
        """The stored parts of the quantized tensor `name`, by the last part of their names.

        `codes`, packed into (bytes,) uint8, and, as the scheme and the codebook need them, `centroids` (K, d) float16
        or uint8 and `affine` (2, 1 or channels) float32.
        """
        return {part.rpartition(".")[2]: self.tensors[part] for part in self.parts(name)}

    def _quantized_state(self, name: str, entry: QuantizedTensor) -> dict[str, Tensor]:
        owner = entry.codebook or name
        return entry.format.unpack(entry, self.parts_of(owner) | self.parts_of(name), self._shared.get(owner))


def pack(model: nn.Module, plan: Plan | None = None, config: Mapping[str, Any] | None = None) -> Packed:
    """The tensors of `model` and their manifest; the model is not changed.

    Args:
        model: with quantized weights or without.
        plan: the plan that quantized it, recorded; its `dense` says how tensors without codes are stored.
        config: how to build the network (`Manifest.model`), recorded.
    """
    quantized, turned = _quantized(model)
    codebooks = _codebooks(quantized)
    entries = {
        name: replace(weight.entry(codebooks.get(name)), transposed=name in turned)
        for name, weight in quantized.items()
    }
    tensors, ties = _each_once(model)
    inputs = {
        name: {"bits": q.bits, "low": float(q.range[0]), "high": float(q.range[1])}
        for name, q in input_quantizers(model).items()
        if q.count
    }
    layers, ties = maps_and_ties(ties, [*tensors, *entries])
    dense = ""
    if plan is not None and plan.dense.bits == 16:
        tensors, dense = _halved(tensors, {name for name, _ in model.named_buffers()})
    for name, weight in quantized.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in weight.pack(entries[name]).items()}
    manifest = Manifest(
        producer=f"fairseq_quant_noise {__version__}",
        model=dict(config or {}),
        plan=plan.to_dict() if plan else {},
        tensors=entries,
        ties=ties,
        layers=layers,
        inputs=inputs,
        dense=dense,
    )
    return Packed({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, manifest)


def _halved(tensors: dict[str, Tensor], buffers: set[str]) -> tuple[dict[str, Tensor], str]:
    """Dense tensors in fp16 where their values survive, and `Manifest.dense`.

    A network that has fp16 of its own stays as it is: a file has no word for which tensors are which.
    """
    if any(tensor.dtype == torch.float16 for tensor in tensors.values()):
        return tensors, ""
    found = {name: halved(name, tensor.detach(), name in buffers) for name, tensor in tensors.items()}
    return found, HALVED if any(tensor.dtype == torch.float16 for tensor in found.values()) else ""


def _quantized(model: nn.Module) -> tuple[dict[str, QuantizedWeight], set[str]]:
    """The quantized weights by the tensor's name, and the names of those that their modules store turned."""
    found = {w.tensor_name: (w.stored, w.turned) for w in find_weights(model)}
    quantized = {name: stored for name, (stored, _) in found.items() if isinstance(stored, QuantizedWeight)}
    return quantized, {name for name in quantized if found[name][1]}


def _codebooks(quantized: Mapping[str, QuantizedWeight]) -> dict[str, str]:
    """For each tensor that uses the codebook of one before it: that one."""
    first: dict[int, str] = {}
    shared = {name: held for name, weight in quantized.items() if (held := weight.shared()) is not None}
    owners = {name: first.setdefault(id(held), name) for name, held in shared.items()}
    return {name: owner for name, owner in owners.items() if name != owner}


def _each_once(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The dense tensors of the state dict, and the ties of dense and quantized tensors alike."""
    owners = {id(weight): name for name, weight in _quantized(model)[0].items()}
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if f".{INPUT_QUANTIZER}." in f".{name}":
            continue
        logical, weight = _quantized_part(name, model)
        owner = owners.setdefault(id(tensor if weight is None else weight), logical)
        if owner != logical:
            ties[logical] = owner
        elif weight is None:
            tensors[name] = tensor
    return tensors, ties


def _quantized_part(name: str, model: nn.Module) -> tuple[str, nn.Module | None]:
    """For the state entries X.weight and X.weight.codes of a quantized weight: X.weight and the quantized weight."""
    for path in (name, name.rpartition(".")[0]):
        module = _submodule(model, path)
        if isinstance(module, QuantizedWeight):
            return path, module
    return name, None


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for part in path.split("."):
        module = module._modules.get(part) if module is not None else None
    return module
