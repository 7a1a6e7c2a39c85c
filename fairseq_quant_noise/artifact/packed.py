"""A model as the tensors and the manifest of a packed file, and back to the state that a model loads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..layers import PQWeight, quantized_weights
from ..layers.quantized import CENTROIDS, CODES
from ..plan import Plan
from ..weights import tensor_name
from .manifest import Manifest, QuantizedTensor


@dataclass(frozen=True)
class Packed:
    """What is in a packed file. Tensors by the file's names, tied copies left out."""

    tensors: dict[str, Tensor]
    manifest: Manifest

    def state_dict(self) -> dict[str, Tensor]:
        """The state that the quantized model loads: centroids in fp32, tied copies filled in."""
        state = {name: tensor.float() if self._is_centroids(name) else tensor for name, tensor in self.tensors.items()}
        for copy, owner in self.manifest.ties.items():
            for suffix in (f".{CODES}", f".{CENTROIDS}") if owner in self.manifest.tensors else ("",):
                state[copy + suffix] = state[owner + suffix]
        return state

    def _is_centroids(self, name: str) -> bool:
        owner, _, last = name.rpartition(".")
        return last == CENTROIDS and owner in self.manifest.tensors

    def tensor_bytes(self, name: str) -> int:
        """Bytes in the file of the tensor `name`: of codes and centroids, or of the dense tensor."""
        parts = [f"{name}.{CODES}", f"{name}.{CENTROIDS}"] if name in self.manifest.tensors else [name]
        return sum(self.tensors[p].numel() * self.tensors[p].element_size() for p in parts)


def pack(model: nn.Module, plan: Plan | None = None, config: Mapping[str, Any] | None = None) -> Packed:
    """The tensors of `model` and their manifest; the model is not changed.

    Args:
        model: with quantized weights or without.
        plan: the plan that quantized it, recorded.
        config: how to build the network (`Manifest.model`), recorded.
    """
    from .. import __version__

    quantized = {tensor_name(name): weight for name, weight in quantized_weights(model).items()}
    tensors, ties = _each_once(model, quantized)
    for name, weight in quantized.items():
        tensors[f"{name}.{CODES}"] = weight.codes
        tensors[f"{name}.{CENTROIDS}"] = weight.centroids.half()
    manifest = Manifest(
        producer=f"fairseq_quant_noise {__version__}",
        model=dict(config or {}),
        plan=plan.to_dict() if plan else {},
        tensors={
            name: QuantizedTensor("pq", tuple(w.shape), w.block_size, w.n_centroids) for name, w in quantized.items()
        },
        ties=ties,
    )
    return Packed({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, manifest)


def _each_once(model: nn.Module, quantized: Mapping[str, PQWeight]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The dense tensors of the state dict, and the ties of dense and quantized tensors alike."""
    owners = {id(t): name for name, weight in quantized.items() for t in (weight.codes, weight.centroids)}
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        logical = _logical_name(name, model)
        owner = owners.setdefault(id(tensor), logical)
        if owner != logical:
            ties[logical] = owner
        elif logical not in quantized:
            tensors[name] = tensor
    return tensors, ties


def _logical_name(name: str, model: nn.Module) -> str:
    """`X.weight` for the state entries X.weight.codes and X.weight.centroids; else the name itself."""
    parent, _, last = name.rpartition(".")
    if last in (CODES, CENTROIDS) and isinstance(_submodule(model, parent), PQWeight):
        return parent
    return name


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for part in path.split("."):
        module = module._modules.get(part) if module is not None else None
    return module
