"""Intercept reads of a module's weights: there noise and quantization act.

An attention may hand `q_proj.weight` straight to a functional, and an adaptive softmax may tie its weights to the
embedding, so a hook on `forward` misses both. Here the module's class is replaced by a subclass of the same name in
which each such weight (KEY: `weight`, `in_proj_weight`, ...) is a property. What is stored stays where it was
(`_parameters[KEY]`, so names, `state_dict`, optimizers and DDP see no difference); what is read may be noised, or
decoded from codes:

    module._modules[KEY]     a quantized weight: reading decodes it (or distorts what it is trained on)
    module._KEY_noise        a noise: reading while a training forward runs distorts the stored Parameter
"""

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import is_conv1d

#: torch.export and torch.func.functional_call find a module by its name with `getattr`; here it has a weight's name.
_BY_NAME = "torch.nn.utils._named_member_accessor"
LATENT = "latent"  # the name, inside a quantized weight in training, of the dense Parameter that it is computed from


class WeightAccess:
    """Mixed into a module's class by `intercept`."""

    _intercepted: type  # the class without this one
    _turned: dict[str, bool]  # by KEY: whether a quantized weight has the first two dimensions exchanged
    _parameters: dict[str, Any]
    _modules: dict[str, Any]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        """A quantized weight that is still dense in store is saved under the dense weight's own name."""
        for key in self._turned:
            quantized, name = self._modules.get(key), prefix + key
            if quantized is not None and LATENT in quantized._parameters and name in state_dict:
                state_dict[f"{name}.{LATENT}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the module's, for `pickle` and `copy`: the class is made anew, since it has no place in a module."""
        reduced: Any = super().__reduce_ex__(protocol)
        return (_rebuilt, (self._intercepted, tuple(self._turned.items())), *reduced[2:])


def _rebuilt(cls: type, turned: tuple[tuple[str, bool], ...]) -> Any:
    return object.__new__(_with_access(cls, turned))


def _property(key: str, turned: bool) -> property:
    noise_name = noise_attribute(key)

    def read(self: Any) -> Tensor:
        """The effective weight for this read (stored, noised or decoded), in the dense shape."""
        quantized = self._modules.get(key)
        noise = self.__dict__.get(noise_name)
        if quantized is None:
            stored: Tensor = self._parameters[key]
            return stored if noise is None else noise(self, stored)
        if not torch.compiler.is_dynamo_compiling() and sys._getframe(1).f_globals.get("__name__") == _BY_NAME:
            found: Tensor = quantized
            return found
        latent = quantized._parameters.get(LATENT)
        if latent is None or noise is None or not quantized.training:
            seen: Tensor = quantized.decode()
            return seen.transpose(0, 1) if turned else seen
        return noise(self, latent)

    return property(read)


class _Linear(WeightAccess):
    """A Linear whose quantized weight may multiply without being decoded; nn.Linear, a Conv1D, or a TiedLinear."""

    transpose = False  # a TiedLinear sets its own

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """The class's own product, (..., I) to (..., O), from the codes where the quantized weight multiplies."""
        quantized = settled_weight(self)
        product: Tensor | None = None
        if quantized is not None:
            product = quantized.product(input, self._parameters.get("bias"))
        if product is not None:
            return product
        return super().forward(input)  # type: ignore[misc]


def multiplier(module: Any, x: Tensor) -> Any:
    """The quantized weight by which a Linear multiplies x (..., I) without decoding it, or None."""
    quantized = settled_weight(module)
    return quantized if quantized is not None and quantized.multiplies(x) else None


def settled_weight(module: Any) -> Any:
    """The quantized weight of a Linear that is x W^T of it, as in a file and not in training; or None."""
    if not isinstance(module, _Linear):
        return None
    quantized = module._modules.get("weight")
    return None if quantized is None or quantized.training or module.transpose else quantized


class _Embedding(WeightAccess):
    """An Embedding whose quantized weight decodes the rows that are looked up, and no others."""

    max_norm: float | None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """As nn.Embedding's, (...) int to (..., C); a quantized weight decodes only the rows in `input`, if it can."""
        quantized = self._modules.get("weight")
        if quantized is not None and not quantized.training and self.max_norm is None and quantized.has_rows():
            return quantized.rows(input)
        return super().forward(input)  # type: ignore[misc]


class _Recurrent(WeightAccess):
    """An LSTM, GRU or RNN: torch's keep a list of their weights, here made of what is read, once a forward."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        now: list[Tensor | None] | None = self.__dict__.get("_read")
        if now is not None:
            return now
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: object) -> None:
        """torch's own list would hold the dense weights."""

    def _update_flat_weights(self) -> None:
        """Nothing to do: the list is made anew for each forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class's own."""
        self.__dict__["_read"] = self._flat_weights
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            del self.__dict__["_read"]


_FORMS: list[tuple[Any, type]] = [(nn.Linear, _Linear), (nn.Embedding, _Embedding)]


def register_linear(cls: type) -> type:
    """Let modules of `cls` multiply by codes; its forward is x W^T, or x W where `transpose` is true. Returns `cls`."""
    _FORMS.append((cls, _Linear))
    return cls


def _form(cls: Any, keys: list[str]) -> type:
    if issubclass(cls, nn.RNNBase):
        return _Recurrent
    if keys != ["weight"]:
        return WeightAccess
    if is_conv1d(cls):
        return _Linear
    return next((form for base, form in _FORMS if issubclass(cls, base) and cls.forward is base.forward), WeightAccess)


@functools.cache
def _with_access(cls: Any, turned: tuple[tuple[str, bool], ...]) -> type:
    contents: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    contents |= {"_intercepted": cls, "_turned": dict(turned)}
    contents |= {key: _property(key, is_turned) for key, is_turned in turned}
    return type(cls.__name__, (_form(cls, [key for key, _ in turned]), cls), contents)


def intercept(module: nn.Module, key: str = "weight", turned: bool = False) -> None:
    """Route reads of the module's parameter `key` through a property, in place; a second call changes nothing."""
    known: dict[str, bool] = module._turned if isinstance(module, WeightAccess) else {}
    if key not in known:
        cls: Any = module._intercepted if isinstance(module, WeightAccess) else type(module)
        module.__class__ = _with_access(cls, tuple({**known, key: turned}.items()))
        if isinstance(module, _Recurrent):
            module.__dict__.pop("_flat_weights", None)


def release(module: nn.Module) -> None:
    """Undo `intercept`: the module's weights are the stored Parameters again.

    A class that somebody else has made from ours since (torch's fully_shard) stays, with its properties.
    """
    if isinstance(module, WeightAccess) and "_intercepted" in vars(type(module)):
        module.__class__ = type(module)._intercepted
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()


def noise_attribute(key: str) -> str:
    """The attribute of a module that holds the noise of its parameter `key`."""
    return f"_{key}_noise"


def noises(module: nn.Module) -> dict[str, Any]:
    """The noises on the weights of `module`, by the parameter's name."""
    if not isinstance(module, WeightAccess):
        return {}
    held = ((key, module.__dict__.get(noise_attribute(key))) for key in module._turned)
    return {key: noise for key, noise in held if noise is not None}


def remove_noises(module: nn.Module) -> None:
    """Take the noises off the weights of `module`; where none is quantized, they are plain Parameters again."""
    for key in noises(module):
        del module.__dict__[noise_attribute(key)]
    if isinstance(module, WeightAccess) and all(module._modules.get(key) is None for key in module._turned):
        release(module)
