"""Prune and share the layers of a network, whose stacks are the ModuleLists called `layers`.

Each use of a shared layer keeps a module of its own, since attention caches keys per layer and each use has its own
input range. All uses hold the same Parameters or quantized weights, so that noise, optimizer, stages and file see one
weight (`weights/discovery.py`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..layers import QuantizedWeight
from .layer_map import Keep, chunk_map, is_learned, kept_layers, learned_layers, parse_keep, side_of
from .state import stack_sizes

SCORES = "keep_scores"  # the Parameter of a stack whose keep rates are learned (`learned_rates.py`)


class LayerStack(nn.ModuleList):
    """A stack of layers in which training leaves out chunks at random: LayerDrop (arXiv 1909.11556).

    Args:
        layers: in their order.
        chunk: adjacent layers that stay or go together.
        p: the probability of leaving a chunk out, anew in each iteration over the stack.
    """

    def __init__(self, layers: Iterable[nn.Module] | None = None, chunk: int = 1, p: float = 0.0) -> None:
        super().__init__(layers)
        self.chunk, self.p = chunk, p

    def __iter__(self) -> Iterator[nn.Module]:
        stay = None
        if self.training and self.p > 0:
            stay = (torch.rand(-(-len(self) // self.chunk)) > self.p).tolist()
        for i, layer in enumerate(super().__iter__()):
            if stay is None or stay[i // self.chunk]:
                yield layer


def find_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The stacks of `model` by name, such as `decoder.layers`; not those inside a layer."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{stack}.") for stack in found)
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "layers" and len(module) and not inside:
            found[name] = module
    return found


def require_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The stacks of `model` by name, as `find_stacks`, at least one.

    Raises:
        UserError: `model` has no ModuleList called `layers`.
    """
    stacks = find_stacks(model)
    if not stacks:
        raise UserError("this network has no ModuleList called 'layers', whose layers could be shared or pruned")
    return stacks


def layers_in(stack: nn.ModuleList) -> list[nn.Module]:
    """All layers of the stack, including those that LayerDrop would skip."""
    return [stack[i] for i in range(len(stack))]


@torch.no_grad()
def share_layers_(model: nn.Module, chunk: int, start: str = "first") -> nn.Module:
    """Give each chunk of adjacent layers of every stack one set of weights, in place; the same model comes back.

    Call it before `attach_noise`. Chunks of a stack under LayerDrop stay or go as a whole from then on.

    Args:
        model: any network with a ModuleList `layers`.
        chunk: N, layers that share.
        start: `first`, the weights of the chunk's first layer, or `mean`, over its layers.

    Raises:
        UserError: the model has no stack, N does not divide a stack's layers, or layers of a chunk differ in the names
            or shapes of their weights.
    """
    stacks = require_stacks(model)
    maps = {name: chunk_map(name, len(stack), chunk) for name, stack in stacks.items()}
    for name, stack in stacks.items():
        layers = layers_in(stack)
        for i in range(0, len(layers) if start == "mean" else 0, chunk):
            _average(f"{name}.{i}", layers[i : i + chunk])
        if chunk > 1 and getattr(stack, "p", 0) > 0:
            set_layerdrop(model, name, stack, chunk, float(stack.p))  # type: ignore[arg-type]
    tie_layers_(model, maps)
    return model


def _average(name: str, layers: list[nn.Module]) -> None:
    """Put the mean over the layers into the first."""
    for path, module in layers[0].named_modules():
        places = [_place(name, layer, path, module) for layer in layers]
        for key, parameter in module._parameters.items():
            each = [place._parameters[key] for place in places]
            if parameter is not None and any(one is not parameter for one in each):
                parameter.copy_(torch.stack([one.float() for one in each if one is not None]).mean(0))


def tie_layers_(model: nn.Module, maps: Mapping[str, Sequence[int]]) -> None:
    """Make layers hold the weights of other layers of their stack.

    Args:
        model: any network.
        maps: by stack, for each layer in use the layer that stores its weights (see `layer_map.chunk_map`).

    Raises:
        UserError: the network does not have these layers, or their weights differ in name or shape.
    """
    stacks = find_stacks(model)
    for name, stored in maps.items():
        if name not in stacks or len(stacks[name]) != len(stored):
            raise UserError(
                f"{name}: the network does not have these {len(stored)} layers; give the one it was saved from"
            )
        for i, j in enumerate(stored):
            if i != j:
                _tie(f"{name}.{i}", stacks[name][j], stacks[name][i])


def _tie(name: str, first: nn.Module, other: nn.Module) -> None:
    for path, module in first.named_modules():
        if isinstance(module, QuantizedWeight):
            continue
        place = _place(name, other, path, module)
        place._parameters.update(module._parameters)
        place._modules.update(_quantized(module))


def _place(name: str, layer: nn.Module, path: str, like: nn.Module) -> nn.Module:
    """The module `path` of `layer`, which will share the weights of `like`. Raises UserError where shapes differ."""
    place = dict(layer.named_modules()).get(path)
    if place is None or _shapes(place) != _shapes(like):
        raise UserError(f"{name}: its chunk has a layer without the same {path or 'weights'}; such layers cannot share")
    return place


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...] | None]:
    shapes = {key: None if p is None else tuple(p.shape) for key, p in module._parameters.items()}
    return shapes | {f"{key}, quantized": tuple(held.shape) for key, held in _quantized(module).items()}


def _quantized(module: nn.Module) -> dict[str, QuantizedWeight]:
    return {key: child for key, child in module._modules.items() if isinstance(child, QuantizedWeight)}


def set_layerdrop(model: nn.Module, name: str, stack: nn.ModuleList, chunk: int, p: float) -> None:
    """Let training leave out chunks of the stack called `name` with probability p."""
    set_stack(model, name, LayerStack(layers_in(stack), chunk, p))


def set_stack(model: nn.Module, name: str, stack: nn.ModuleList) -> None:
    """Put `stack` in the place of the one called `name`, in its mode."""
    parent, _, last = name.rpartition(".")
    stack.training = model.get_submodule(name).training
    setattr(model.get_submodule(parent), last, stack)


def shared_chunk(stack: nn.ModuleList) -> int:
    """N, how many adjacent layers of the stack share their weights; 1 where none do."""
    firsts = [_first_held(layer) for layer in layers_in(stack)]
    return next((i for i, held in enumerate(firsts) if held is not firsts[0]), len(firsts))


def _first_held(layer: nn.Module) -> object:
    for module in layer.modules():
        if isinstance(module, QuantizedWeight):
            return module
        held = next((p for p in module._parameters.values() if p is not None), None)
        if held is not None:
            return held
    return layer


def keep_layers_(model: nn.Module, keep: object) -> dict[str, list[int]]:
    """Take layers out of the stacks of `model`, in place.

    Args:
        model: any network with a ModuleList `layers`, best one trained with LayerDrop.
        keep: `every-other`, a list of layers, `learned` (those with the highest rates, see `learn_layerdrop_`) or
            `learned:N`, or a mapping from stacks (`decoder.layers`, or `decoder`) to one of these; stacks that a
            mapping leaves out stay whole. Layers that share their weights stay or go together.

    Returns:
        By stack, the layers that stayed.

    Raises:
        UserError: the model has no stack, or `keep` names an unknown stack or layer, a layer twice, no layer at all,
            only part of a chunk, or learned rates that are not there.
    """
    stacks = require_stacks(model)
    wanted = keep_by_stack("keep_layers", keep, list(stacks), learned=True)
    kept = {name: _kept(name, stacks[name], which) for name, which in wanted.items()}
    for name, layers in kept.items():
        remove_layers(model, name, layers)
    return kept


def _kept(name: str, stack: nn.ModuleList, keep: Keep) -> list[int]:
    sizes = len(stack), shared_chunk(stack)
    if is_learned(keep):
        scores: Any = stack._parameters.get(SCORES)
        found = None if scores is None else scores.tolist()
        return learned_layers("keep_layers", keep, name, *sizes, found, getattr(stack, "p", None))
    return kept_layers("keep_layers", keep, name, *sizes)


def keep_by_stack(where: str, keep: object, stacks: Sequence[str], learned: bool = False) -> dict[str, Keep]:
    """Split the `keep` of `keep_layers_` into a Keep for each stack that it prunes; some allow `learned`.

    Raises:
        UserError: `keep` names a stack that is not among `stacks`, or holds no valid list of layers.
    """
    if not isinstance(keep, dict):
        return dict.fromkeys(stacks, parse_keep(where, keep, learned))
    found: dict[str, Keep] = {}
    for key, which in keep.items():
        names = [name for name in stacks if key in (name, name.partition(".")[0], side_of(name))]
        if not names:
            raise UserError(f"{where} names the stack {key!r}; there are: {', '.join(stacks) or 'none'}")
        found.update(dict.fromkeys(names, parse_keep(f"{where} of {key}", which, learned)))
    return found


def remove_layers(model: nn.Module, name: str, keep: Sequence[int]) -> None:
    """Remove all layers but `keep` from the stack `name`, and update their owner's count of them (`num_layers`)."""
    stack: Any = model.get_submodule(name)
    for i in reversed(range(len(stack))):
        if i not in keep:
            del stack[i]
    if stack._parameters.get(SCORES) is not None:
        stack.forget()
    parent: Any = model.get_submodule(name.rpartition(".")[0])
    if isinstance(getattr(parent, "num_layers", None), int):
        parent.num_layers = len(keep)


def fit_stacks(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Shorten each stack of `model` to as many layers as `state` has, so that it can load a pruned state."""
    stacks = find_stacks(model)
    for name, n in stack_sizes(state).items():
        if name in stacks and n < len(stacks[name]):
            remove_layers(model, name, range(n))
