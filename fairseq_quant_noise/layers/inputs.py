"""Round to N bits the input of each product with a quantized weight, on a range that is calibrated and frozen.

A module that holds a quantized weight and multiplies by it (any holder but an Embedding, which looks up) gets a child
`input_quantizer`, which its state holds as `….fc1.input_quantizer.range`. In eval mode the input is rounded to the
codes of that range. The range is the mean over calibration forwards of each one's range:

- `calibrating(model)`: the forwards inside, in eval mode, before evaluation (arXiv 2004.07320); in training with the
  plugin, before each validation and checkpoint (`plugin/training/input_ranges.py`);
- in training, the first `batches` forwards, and one in a hundred from then on, so that it follows the weights.

Until the first of them, the range is that of the input itself.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..errors import UserError
from ..kernels import in_graph
from ..scalar import INPUT_RANGES, RANGES, Affine, fake_quantize
from ..scalar.ranges import histogram_range
from ..utils.autograd import in_backward
from ..utils.modes import evaluating
from ..weights.access import multiplier
from ..weights.discovery import Place, find_weights, some_of
from .parts import numbers_in

logger = logging.getLogger(__name__)

NAME = "input_quantizer"
GRID = "_grid"  # an attribute of a rounded input: scale and zero point, (2,) float32, for a product in whole numbers
FAST_PATH_OFF = "skip_embed_dim_check"  # an attention's attribute; true keeps it from torch's fast path
SPARSE = 100  # in training, one forward in so many is looked at after the first ones


class InputQuantizer(nn.Module):
    """Rounds a module's input to N bits.

    Args:
        bits: N.
        range_: tensor (min and max) or histogram (`scalar/ranges.py`), of one forward's input.
        batches: forwards that the range is a mean over.
    """

    def __init__(self, bits: int, range_: str, batches: int) -> None:
        super().__init__()
        self.bits, self.kind, self.batches = bits, range_, batches
        self.register_buffer("range", torch.zeros(2))  # low, high
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))  # forwards
        spec = [bits, RANGES.index(range_), min(batches, 255)]
        self.register_buffer("spec", torch.tensor(spec, dtype=torch.uint8))
        self.calibrating = False
        self._grid: tuple[Tensor, object, Tensor] | None = None  # the range, its state, and scale and zero point (2,)
        self._count: int | None = None  # `seen` as a number: reading the buffer makes a GPU wait

    range: Tensor
    seen: Tensor
    spec: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x, of any shape (…), rounded to its codes; in training, while calibrating, and of integers, x itself."""
        if not x.is_floating_point():
            return x
        if self.calibrating or (self.training and not in_backward()):
            self._observe(x.detach())
        if self.calibrating or self.training:
            return x
        affine = self._affine(x)
        rounded = fake_quantize(x, affine)
        if not in_graph():
            setattr(rounded, GRID, affine.to_tensor().flatten())
        return rounded

    def with_grid(self, x: Tensor) -> Tensor:
        """x (…) itself, to be rounded by the product in whole numbers that takes it: its range is a `GRID`."""
        alias = x.view_as(x)  # x may be the input of other modules too
        setattr(alias, GRID, self.grid(x))
        return alias

    def grid(self, x: Tensor) -> Tensor:
        """Scale and zero point (2,) float32 for an input x (…), which counts before any range was found."""
        state = self.range.tolist() if self.range.is_inference() else self.range._version  # which has no version
        kept = self._grid
        if kept is None or kept[0] is not self.range or kept[1] != state or not self.count:
            self._grid = kept = self.range, state, self._affine(x).to_tensor().flatten()
        return kept[2]

    def _affine(self, x: Tensor) -> Affine:
        low, high = self.range if self.count else x.detach().float().aminmax()
        return Affine.of_range(low.reshape(1), high.reshape(1), self.bits)

    @property
    def count(self) -> int:
        """Forwards with finite inputs, seen in training or calibration."""
        if self._count is None:
            self._count = int(self.seen)
        return self._count

    def _observe(self, x: Tensor) -> None:
        seen = self.count
        if self.calibrating or seen < self.batches or seen % SPARSE == 0:
            found = torch.stack(x.float().aminmax())
            if not bool(found.isfinite().all()):  # the batch overflowed under fp16: the next one takes its place
                return
            if self.kind == "histogram":
                found = torch.cat(histogram_range(x, self.bits))
            self.range += (found - self.range) / min(seen + 1, self.batches)
        self.seen += 1
        self._count = seen + 1

    def reset(self) -> None:
        """Forget the range."""
        self.range.zero_()
        self.seen.zero_()
        self._count = 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "InputQuantizer":
        kept = self.range
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.range = kept.to(self.range.device)  # float32, whatever the model's dtype
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: object, strict: bool, *lists: list[str]
    ) -> None:
        missing: list[str] = lists[0]
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        missing[:] = [name for name in missing if not name.startswith(prefix)]  # a checkpoint from before
        self._count = None


def quantize_input_(module: nn.Module, bits: int, range_: str, batches: int) -> None:
    """Give `module` an input quantizer; one that is there stays."""
    if NAME not in module._modules:
        held = next(chain(module.parameters(), module.buffers()))
        module.add_module(NAME, InputQuantizer(bits, range_, batches).to(held.device).train(module.training))
        module.register_forward_pre_hook(_quantize_input, with_kwargs=True)


def _quantize_input(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[object, dict[str, object]]:
    """Round the first argument."""
    if args:
        return (_rounded(module, args[0]), *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, kwargs | {first: _rounded(module, kwargs[first])}


def _rounded(module: nn.Module, x: Any) -> Tensor:
    """The input x (…), rounded; or about to be, by a product that does so itself."""
    quantizer = module._modules[NAME]
    assert isinstance(quantizer, InputQuantizer)
    weight = multiplier(module, x) if quantizer.bits == 8 else None
    settled = not (quantizer.training or quantizer.calibrating or in_graph())
    if settled and weight is not None and weight.in_integers(x):
        return quantizer.with_grid(x)
    return quantizer(x)


def quantize_inputs_(model: nn.Module, names: Iterable[str], bits: int, range_: str, batches: int) -> None:
    """Quantize the inputs of every module that multiplies by one of the weights `names` (owners' module names).

    An attention that can do without its fast path, which reads the projections' weights and calls none of them, is kept
    from it.
    """
    wanted = set(names)
    for weight in find_weights(model):
        if weight.name in wanted:
            for place in weight.places:
                if is_product(place):
                    quantize_input_(place.module, bits, range_, batches)
    for module in model.modules():
        if FAST_PATH_OFF in module.__dict__:
            module.__dict__[FAST_PATH_OFF] = True


def is_product(place: Place) -> bool:
    """Whether the one input of the place's module is what the weight is multiplied with."""
    return not _looks_up(place.module) and why_not_rounded(place) is None


def _looks_up(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def why_not_rounded(place: Place) -> str | None:
    """Why the input that is multiplied with the weight in this place cannot be rounded; None where it can."""
    module = place.module
    if isinstance(module, nn.MultiheadAttention | NonDynamicallyQuantizableLinear):
        return "torch's attention multiplies by it inside of one function"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "a recurrent layer multiplies its own states as well"
    if isinstance(module, nn.Bilinear):
        return "it has two inputs"
    if place.key != "weight":
        return "its module multiplies by another weight, computed from this one"
    if not set(module._modules) <= {"weight", NAME}:
        return "its module has layers of its own before the product"
    return None


def unrounded(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The weights among `names` with an input that cannot be rounded, by the tensor's name, each with the reason.

    An embedding looks rows up; there is nothing to round.
    """
    wanted, found = set(names), {}
    for weight in find_weights(model):
        for place in weight.places if weight.name in wanted else ():
            why = None if _looks_up(place.module) else why_not_rounded(place)
            if why is not None:
                found[place.tensor_name] = why
    return found


def warn_of_unrounded(model: nn.Module, names: Iterable[str], strict: bool = False) -> None:
    """Log one warning that names the weights of a plan with `activations` whose inputs stay as they are.

    Raises:
        UserError: there are some, and `strict` is true.
    """
    left = unrounded(model, names)
    if left:
        some = some_of([f"{name} ({why})" for name, why in left.items()])
        text = (
            f"activations: the inputs of {len(left)} weights are not rounded: {some}; build these layers "
            "of nn.Linear, or leave `activations` out"
        )
        if strict:
            raise UserError(text)
        logger.warning(text)


def input_quantizers(model: nn.Module) -> dict[str, InputQuantizer]:
    """The input quantizers of `model`, by the name of the module whose input they round."""
    found = ((name, module._modules.get(NAME)) for name, module in model.named_modules())
    return {name: quantizer for name, quantizer in found if isinstance(quantizer, InputQuantizer)}


def adopt_input_quantizers(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give `model` the input quantizers that `state` has ranges for, ready to load it.

    Args:
        model: any.
        state: by name; of each input quantizer `range` (2,), `seen` () and `spec` (3,).

    Raises:
        DamagedFileError: a `spec` holds something else.
    """
    ours = dict(model.named_modules())
    changed = False
    for key, spec in state.items():
        path, _, last = f".{key}".rpartition(f".{NAME}.")
        module = ours.get(path.removeprefix("."))
        if last == "spec" and module is not None:
            bits, index, batches = numbers_in(key, spec, 3, RANGES)
            there = module._modules.get(NAME)
            if isinstance(there, InputQuantizer) and not torch.equal(there.spec.cpu(), spec.cpu()):
                module._modules[NAME] = InputQuantizer(bits, RANGES[index], batches).to(there.range.device)
            quantize_input_(module, bits, RANGES[index], batches)
            changed = True
    if changed:
        quantize_inputs_(model, (), 0, INPUT_RANGES[0], 0)


@contextmanager
def calibrating(model: nn.Module, required: bool = True) -> Iterator[None]:
    """Find the ranges anew from the forwards inside, which run in eval mode, on inputs like those to come.

    Args:
        model: with input quantizers.
        required: whether each of them must see an input; else those that see none keep the range they had.

    Raises:
        UserError: no input reached a quantizer that is required to see one.
    """
    quantizers = input_quantizers(model)
    before = {name: copy.deepcopy(quantizer.state_dict()) for name, quantizer in quantizers.items()}
    with evaluating(model):
        for quantizer in quantizers.values():
            quantizer.reset()
            quantizer.calibrating = True
        try:
            yield
        finally:
            for quantizer in quantizers.values():
                quantizer.calibrating = False
    silent = [name for name, quantizer in quantizers.items() if not quantizer.count]
    if silent and required:
        raise UserError(f"{silent[0]}: no finite calibration input reached it; give batches that use the whole model")
    for name in silent:
        quantizers[name].load_state_dict(before[name])
