"""Measure how large the noise is, by kind of layer, in one training forward of a model with noise.

    || psi(W) - W || / || W ||              of the weights
    || y(psi(W)) - y(W) || / || y(W) ||     of the outputs of the layers on the same input

Norms are Frobenius norms over all layers of a kind. A kind is the last part of a module's name that is no number
(`fc1`); projections go under their module's (`self_attn`).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..weights.access import LATENT, noises
from ..weights.discovery import stored_weight
from .attach import noise_of
from .weight_noise import WeightNoise

logger = logging.getLogger(__name__)


@dataclass
class MeasuredDistortion:
    """Sums of squares for one kind of layer."""

    weight: list[float]  # squared norms of psi(W) - W and of W
    output: list[float]  # squared norms of y(psi(W)) - y(W) and of y(W)

    @property
    def of_weight(self) -> float | None:
        """Relative; None for weights that are all zero."""
        return _relative(self.weight)

    @property
    def of_output(self) -> float | None:
        """Relative; None where no output was seen."""
        return _relative(self.output)


def _relative(sums: list[float]) -> float | None:
    return (sums[0] / sums[1]) ** 0.5 if sums[1] > 0 else None


def kind_of(name: str) -> str:
    """The kind of layer of the module `name`: decoder.layers.0.fc1 -> fc1, ….self_attn.q_proj -> self_attn."""
    parts = [part for part in name.split(".") if not part.isdigit()] or [""]
    if len(parts) > 1 and parts[-1].endswith("_proj"):
        parts.pop()
    return parts[-1] or "model"


class Probe:
    """Measures the next training forward of `model`, hands {kind: MeasuredDistortion} to `report`, removes itself.

    Layers are run twice more, on their own input and the same random numbers, so that the forward itself, its gradient
    and the random state stay what they would have been. A layer whose weights are read without calling the modules that
    hold them (an attention, say) is measured as a whole.
    """

    def __init__(self, model: nn.Module, report: Callable[[dict[str, MeasuredDistortion]], None]) -> None:
        self.draw = noise_of(model)
        self.report = report
        self.busy = False
        self.handles: list[Any] = []  # hooks for this forward
        self.start = model.register_forward_pre_hook(self._begin)

    def _begin(self, model: nn.Module, inputs: object) -> None:
        """The draw has been made, the layers have not run yet."""
        self._remove()  # hooks that a failed forward left
        self.found: dict[str, MeasuredDistortion] = {}
        self.called: set[nn.Module] = set()
        self.holders = {m: name for name, m in model.named_modules() if noises(m)}
        parents = {model.get_submodule(name.rpartition(".")[0]): name for name in self.holders.values()}
        self.parents = {m: name.rpartition(".")[0] for m, name in parents.items() if m is not model}
        for module in {**self.holders, **self.parents}:
            self.handles.append(module.register_forward_hook(self._outputs, with_kwargs=True))
        self.handles.append(model.register_forward_hook(self._end))
        self._weights()

    def _remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _of(self, name: str) -> MeasuredDistortion:
        return self.found.setdefault(kind_of(name), MeasuredDistortion([0.0, 0.0], [0.0, 0.0]))

    @torch.no_grad()
    def _weights(self) -> None:
        done: set[WeightNoise] = set()
        for module, name in self.holders.items():
            for key, noise in noises(module).items():
                if noise not in done and module.training:
                    done.add(noise)
                    stored = _latent(module, key)
                    _add(self._of(name).weight, noise(module, stored), stored)

    def _outputs(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        if self.busy or not module.training:
            return
        self.called.add(module)
        name = self.holders.get(module)
        if name is None:
            inside = [child for child in module.children() if child in self.holders]
            if all(child in self.called for child in inside):
                return
            name = self.parents[module]
        self.busy = True
        try:
            with torch.no_grad():
                noised, clean = self._run(module, args, kwargs, False), self._run(module, args, kwargs, True)
        finally:
            self.busy = False
        if noised is not None and clean is not None:
            _add(self._of(name).output, noised, clean)

    def _run(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], muted: bool
    ) -> Tensor | None:
        assert self.draw is not None
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            self.draw.muted = muted
            try:
                output = module.forward(*args, **kwargs)
            finally:
                self.draw.muted = False
        first = output[0] if isinstance(output, tuple | list) else output
        return first if isinstance(first, Tensor) and first.is_floating_point() else None

    def _end(self, model: nn.Module, inputs: object, output: object) -> None:
        self._remove()
        self.start.remove()
        if model.training and self.found:
            self.report(self.found)


def _latent(module: nn.Module, key: str) -> Tensor:
    """The weight that the noise distorts, of any shape; gathered, where it is divided among processes."""
    stored: Any = stored_weight(module, key)
    latent: Any = stored if isinstance(stored, Tensor) else getattr(stored, LATENT)
    whole: Tensor = latent.full_tensor() if hasattr(latent, "full_tensor") else latent
    return whole


def _add(sums: list[float], seen: Tensor, clean: Tensor) -> None:
    sums[0] += float((seen.float() - clean.float()).square().sum(dtype=torch.float64))
    sums[1] += float(clean.float().square().sum(dtype=torch.float64))
