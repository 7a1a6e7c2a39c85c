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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..kernels import in_graph
from ..scalar import INPUT_RANGES, RANGES, Affine, fake_quantize
from ..scalar.ranges import histogram_range
from ..utils.autograd import in_backward
from ..weights.discovery import find_weights
from .parts import numbers_in

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
        low, high = self.range if self.count else x.detach().float().aminmax()
        affine = Affine.of_range(low.reshape(1), high.reshape(1), self.bits)
        rounded = fake_quantize(x, affine)
        if not in_graph():
            setattr(rounded, GRID, affine.to_tensor().flatten())
        return rounded

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
    quantizer: Any = module._modules[NAME]
    if args:
        return (quantizer(args[0]), *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, kwargs | {first: quantizer(kwargs[first])}


def quantize_inputs_(model: nn.Module, names: Iterable[str], bits: int, range_: str, batches: int) -> None:
    """Quantize the inputs of every module that multiplies by one of the weights `names` (owners' module names).

    An attention that can do without its fast path, which reads the projections' weights and calls none of them, is kept
    from it.
    """
    wanted = set(names)
    for weight in find_weights(model):
        if weight.name in wanted:
            for _, module, key in weight.places:
                if key == "weight" and is_product(module):
                    quantize_input_(module, bits, range_, batches)
    for module in model.modules():
        if FAST_PATH_OFF in module.__dict__:
            module.__dict__[FAST_PATH_OFF] = True


def is_product(module: nn.Module) -> bool:
    """Whether the module's one input is what its weight is multiplied with: no layers of its own come before that."""
    others = isinstance(module, nn.Embedding | nn.EmbeddingBag | nn.Bilinear)
    return not others and set(module._modules) <= {"weight", NAME}


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
    modes = {module: module.training for module in model.modules()}
    before = {name: copy.deepcopy(quantizer.state_dict()) for name, quantizer in quantizers.items()}
    model.eval()
    for quantizer in quantizers.values():
        quantizer.reset()
        quantizer.calibrating = True
    try:
        with torch.no_grad():
            yield
    finally:
        for quantizer in quantizers.values():
            quantizer.calibrating = False
        for module, training in modes.items():
            module.training = training
    silent = [name for name, quantizer in quantizers.items() if not quantizer.count]
    if silent and required:
        raise UserError(f"{silent[0]}: no finite calibration input reached it; give batches that use the whole model")
    for name in silent:
        quantizers[name].load_state_dict(before[name])
