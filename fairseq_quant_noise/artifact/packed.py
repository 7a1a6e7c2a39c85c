"""A model as the tensors and the manifest of a packed file, and back to the state that a model loads."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..layers import QuantizedWeight, input_quantizers, quantized_weights
from ..layers.inputs import NAME as INPUT_QUANTIZER
from ..layers.inputs import InputQuantizer
from ..layers.parts import AFFINE, CENTROID_BITS, CENTROIDS, CODEBOOK, CODES, FILE_AFFINE, SPEC
from ..layers.pq import PQWeight
from ..plan.plan import Plan
from ..scalar import Affine
from ..structure.state import layer_ties, maps_and_ties
from ..utils.bits import pack_bits, unpack_bits
from ..weights.discovery import tensor_name
from .manifest import Manifest, QuantizedTensor

PARTS = (CODES, CENTROIDS, AFFINE)


@dataclass(frozen=True)
class Packed:
    """What is in a packed file. Tensors by the file's names, codes packed, tied copies left out."""

    tensors: dict[str, Tensor]
    manifest: Manifest

    def state_dict(self) -> dict[str, Tensor]:
        """The state that the quantized model loads: a byte a code, centroids in fp32, tied copies filled in."""
        state = {name: self.tensors[name] for name in self.dense_names}
        parts = {name: [""] for name in state}  # what a logical tensor's entries are called after its name
        for name, entry in self.manifest.tensors.items():
            found = {f".{part}": tensor for part, tensor in self._quantized_state(name, entry)}
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

    def parts(self, name: str) -> list[str]:
        """The entries in the file of the tensor `name`."""
        if name not in self.manifest.tensors:
            return [name]
        return [f"{name}.{part}" for part in PARTS if f"{name}.{part}" in self.tensors]

    def tensor_bytes(self, name: str) -> int:
        """Bytes in the file of the tensor `name`: of codes and what they need of their own, or of the dense tensor."""
        return sum(self.tensors[part].numel() * self.tensors[part].element_size() for part in self.parts(name))

    def _quantized_state(self, name: str, entry: QuantizedTensor) -> Iterator[tuple[str, Tensor]]:
        codes = unpack_bits(self.tensors[f"{name}.{CODES}"], entry.n_codes, entry.code_bits)
        if entry.bits is not None:
            yield CODES, codes.view(entry.shape)
            yield AFFINE, self.tensors[f"{name}.{AFFINE}"]
            yield SPEC, torch.tensor([entry.bits, 0], dtype=torch.uint8)
            return
        yield CODES, codes.view(entry.shape[0], -1)
        owner = entry.codebook or name
        centroids = self.tensors[f"{owner}.{CENTROIDS}"]
        if owner in self._shared:
            yield CODEBOOK, torch.tensor(self._shared[owner], dtype=torch.int32)
        if entry.centroid_bits == 16:
            yield CENTROIDS, centroids.float()
        else:
            both = self.tensors[f"{owner}.{AFFINE}"]
            yield CENTROIDS, Affine.of_tensor(both, entry.centroid_bits).decode(centroids)
            yield FILE_AFFINE, both
            yield CENTROID_BITS, torch.tensor(entry.centroid_bits, dtype=torch.uint8)


def pack(model: nn.Module, plan: Plan | None = None, config: Mapping[str, Any] | None = None) -> Packed:
    """The tensors of `model` and their manifest; the model is not changed.

    Args:
        model: with quantized weights or without.
        plan: the plan that quantized it, recorded.
        config: how to build the network (`Manifest.model`), recorded.
    """
    quantized = {tensor_name(name): weight for name, weight in quantized_weights(model).items()}
    codebooks = _codebooks(quantized)
    entries = {
        name: QuantizedTensor(weight.scheme, tuple(weight.shape), **weight.facts(), codebook=codebooks.get(name))
        for name, weight in quantized.items()
    }
    tensors, ties = _each_once(model)
    inputs = {
        name: {"bits": q.bits, "low": float(q.range[0]), "high": float(q.range[1])}
        for name, q in input_quantizers(model).items()
        if q.count
    }
    layers, ties = maps_and_ties(ties, [*tensors, *entries])
    for name, weight in quantized.items():
        parts = weight.parts()
        parts[CODES] = pack_bits(parts[CODES], entries[name].code_bits)
        if name in codebooks:
            parts = {CODES: parts[CODES]}
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    manifest = Manifest(
        producer=f"fairseq_quant_noise {__version__}",
        model=dict(config or {}),
        plan=plan.to_dict() if plan else {},
        tensors=entries,
        ties=ties,
        layers=layers,
        inputs=inputs,
    )
    return Packed({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, manifest)


def _codebooks(quantized: Mapping[str, QuantizedWeight]) -> dict[str, str]:
    """For each tensor that uses the codebook of one before it: that one."""
    first: dict[int, str] = {}
    users = {name: weight for name, weight in quantized.items() if isinstance(weight, PQWeight)}
    owners = {name: first.setdefault(id(weight.centroids), name) for name, weight in users.items()}
    return {name: owner for name, owner in owners.items() if name != owner}


def _each_once(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The dense tensors of the state dict, and the ties of dense and quantized tensors alike."""
    owners = {id(weight): tensor_name(name) for name, weight in quantized_weights(model).items()}
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
    """For the state entries X.weight and X.weight.codes of a quantized weight: X.weight and the weight."""
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
