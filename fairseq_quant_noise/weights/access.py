"""Intercept reads of a module's weight: there noise and quantization act.

An attention may hand `q_proj.weight` straight to a functional, and an adaptive softmax may tie its weights to the
embedding, so a hook on `forward` misses both. Here the module's class is replaced by a subclass of the same name in
which `weight` is a property. What is stored stays where it was (`_parameters['weight']`, so names, `state_dict`,
optimizers and DDP see no difference); what is read may be noised, or decoded from codes:

    module._modules['weight']   a quantized weight: reading decodes it (or distorts what it is trained on)
    module._weight_noise        a noise: reading while a training forward runs distorts the stored Parameter
"""

import functools
from typing import Any

from torch import Tensor, nn

LATENT = "latent"  # the name, inside a quantized weight in training, of the dense Parameter that it is computed from


class WeightAccess:
    """Mixed into a module's class by `intercept`."""

    _parameters: dict[str, Any]
    _modules: dict[str, Any]

    @property
    def weight(self) -> Tensor:
        """The effective weight for this read (stored, noised or decoded), in the dense shape (rows, …)."""
        quantized = self._modules.get("weight")
        noise = self.__dict__.get("_weight_noise")
        if quantized is None:
            stored = self._parameters["weight"]
            return stored if noise is None else noise(self, stored)
        latent = quantized._parameters.get(LATENT)
        if latent is None or noise is None or not quantized.training:
            return quantized.decode()
        return noise(self, latent)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        """A quantized weight that is still dense in store is saved under the dense weight's own name."""
        quantized = self._modules.get("weight")
        if quantized is not None and LATENT in quantized._parameters and f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}weight.{LATENT}"] = state_dict.pop(f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]


class _Linear(WeightAccess):
    """A Linear whose quantized weight may multiply without being decoded; nn.Linear, or a TiedLinear."""

    transpose = False  # a TiedLinear sets its own

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """The class's own product, (..., I) to (..., O), from the codes where the quantized weight multiplies."""
        quantized = self._modules.get("weight")
        if quantized is not None and not (quantized.training or self.transpose) and quantized.multiplies(input):
            return quantized.linear(input, self._parameters.get("bias"))
        return super().forward(input)  # type: ignore[misc]


class _Embedding(WeightAccess):
    """An Embedding whose quantized weight decodes the rows that are looked up, and no others."""

    max_norm: float | None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """As nn.Embedding's, (...) int to (..., C); a quantized weight decodes only the rows in `input`, if it can."""
        quantized = self._modules.get("weight")
        if quantized is not None and not quantized.training and self.max_norm is None and quantized.has_rows():
            return quantized.rows(input)
        return super().forward(input)  # type: ignore[misc]


_FORMS: list[tuple[Any, type]] = [(nn.Linear, _Linear), (nn.Embedding, _Embedding)]


def register_linear(cls: type) -> type:
    """Let modules of `cls` multiply by codes; its forward is x W^T, or x W where `transpose` is true. Returns `cls`."""
    _FORMS.append((cls, _Linear))
    return cls


@functools.cache
def _with_access(cls: type[nn.Module]) -> type:
    mixin: type = WeightAccess
    for base, special in _FORMS:
        if issubclass(cls, base) and cls.forward is base.forward:
            mixin = special
    contents = {"__module__": cls.__module__, "__doc__": cls.__doc__, "_intercepted": cls}
    return type(cls.__name__, (mixin, cls), contents)


def intercept(module: nn.Module) -> None:
    """Route `module.weight` through WeightAccess, in place; a second call changes nothing."""
    if not isinstance(module, WeightAccess):
        module.__class__ = _with_access(type(module))  # type: ignore[arg-type]


def release(module: nn.Module) -> None:
    """Undo `intercept`: `module.weight` is the stored Parameter again."""
    if isinstance(module, WeightAccess):
        module.__class__ = type(module)._intercepted  # type: ignore[attr-defined]
