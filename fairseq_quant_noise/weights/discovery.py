"""Find the weights of a model that can be noised and quantized: each tensor once, with its ties.

A weight is called by its module's name (`decoder.layers.0.fc1`), or, where the parameter has another name than
`weight`, by the parameter's (`layers.0.self_attn.in_proj_weight`); a plan's `match` is a full match over these names. A
tensor that two modules hold (tied embeddings, a tied adaptive softmax) belongs to the first module of a covered type
(`blocks.py`) that holds it; every other holder is an alias. Aliases may be of any type: what they do with the shared
weight is theirs.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..errors import UserError
from .blocks import covered, turn

logger = logging.getLogger(__name__)

_NAMED = 4  # weights in the warning


class Place(NamedTuple):
    """A module that holds a weight."""

    path: str  # the module's name
    module: nn.Module
    key: str  # what it calls the weight

    @property
    def name(self) -> str:
        """What a plan calls the weight: the module's name, or the parameter's where that is not `weight`."""
        return self.path if self.key == "weight" else self.tensor_name

    @property
    def tensor_name(self) -> str:
        """The name in the state dict."""
        return f"{self.path}.{self.key}" if self.path else self.key


@dataclass
class Weight:
    """One stored weight and the modules that hold it."""

    place: Place  # the owner
    turned: bool = False  # stored with the inputs first (`blocks.py`)
    aliases: list[Place] = field(default_factory=list)  # the other holders
    other_names: list[str] = field(default_factory=list)  # holders that nothing here can intercept

    @property
    def name(self) -> str:
        """What a plan calls it."""
        return self.place.name

    @property
    def module(self) -> nn.Module:
        """The owner."""
        return self.place.module

    @property
    def tensor_name(self) -> str:
        """The name in the state dict."""
        return self.place.tensor_name

    def check_ties(self) -> None:
        """Refuse a tie that cannot be kept.

        Raises:
            UserError: a module of a type that is not covered holds this weight under another name than `weight`.
        """
        if self.other_names:
            raise UserError(
                f"{self.name}: its weight is also {self.other_names[0]}, and only ties between attributes called "
                "'weight' can be kept; rename that attribute, or leave this weight out of the plan"
            )

    @property
    def places(self) -> list[Place]:
        """The owner and its aliases."""
        return [self.place, *self.aliases]

    @property
    def holders(self) -> list[tuple[str, nn.Module]]:
        """The modules of `places`, by name."""
        return [(place.path, place.module) for place in self.places]

    @property
    def parameter(self) -> Tensor | nn.Module:
        """What is stored: a Parameter, of any shape, or the quantized weight that has taken its place."""
        return stored_weight(self.module, self.place.key)

    @property
    def stored(self) -> Tensor | nn.Module:
        """What is stored, (rows, …), as its blocks lie: a Parameter, a view of one, or a quantized weight."""
        stored = self.parameter
        return self.turn(stored) if isinstance(stored, Tensor) else stored

    def turn(self, tensor: Tensor) -> Tensor:
        """A tensor like the weight, from the shape that its module stores to that of its blocks, or back."""
        return tensor.transpose(0, 1) if self.turned else tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense weight as its blocks lie, (rows, …)."""
        return tuple(self.stored.shape)  # type: ignore[arg-type]

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape of the dense weight as its module stores it."""
        return turn(self.shape) if self.turned else self.shape


def stored_weight(module: nn.Module, key: str = "weight") -> Tensor | nn.Module:
    """What `module` stores as `key`: a Parameter, without noise, or a quantized weight, not decoded.

    Raises:
        KeyError: `module` stores no such weight.
    """
    parameter = module._parameters.get(key)
    return module._modules[key] if parameter is None else parameter  # type: ignore[return-value]


def load_without_copy(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`model.load_state_dict(state, assign=True)`, strictly, which keeps the model's ties; floats become float32.

    Args:
        model: built on the meta device, so that its weights are in memory once, as those of `state`.
        state: every tensor of the model, by name, of the shape (…) that it has in the model.

    Raises:
        RuntimeError: as torch's; the state does not fit.
    """
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, key))
    plain = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    model.load_state_dict(plain, assign=True)
    for (first, key), *others in holders.values():
        for module, other_key in others:
            module._parameters[other_key] = first._parameters[key]


def _covered_places(model: nn.Module) -> Iterator[tuple[Place, bool]]:
    """Each place of a covered weight, in the order of `named_modules`, and whether it is turned."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        parent = None
        if isinstance(module, ParametrizationList):
            parent = modules[path.rpartition("parametrizations.")[0].removesuffix(".")]
        for key, turned in covered(module, parent).items():
            yield Place(path, module, key), turned


def find_weights(model: nn.Module) -> list[Weight]:
    """Every weight of `model` that has blocks, in the order of `named_modules`, ties joined.

    Weights of modules of other types (a LayerNorm's, a parameter of the model itself) are not among them.
    """
    owners: dict[int, Weight] = {}
    places: set[tuple[int, str]] = set()
    for place, turned in _covered_places(model):
        places.add((id(place.module), place.key))
        key = id(stored_weight(place.module, place.key))
        if key in owners:
            owners[key].aliases.append(place)
        else:
            owners[key] = Weight(place, turned)
    for path, module in model.named_modules():  # modules of other types that hold one of these
        held = {**module._parameters, "weight": module._parameters.get("weight", module._modules.get("weight"))}
        for key, stored in held.items():
            if id(stored) in owners and (id(module), key) not in places:
                place, weight = Place(path, module, key), owners[id(stored)]
                if key == "weight":
                    weight.aliases.append(place)
                else:
                    weight.other_names.append(place.tensor_name)
    return list(owners.values())


def uncovered(model: nn.Module) -> dict[str, str]:
    """The parameters that no rule can name, by name, each with the reason; vectors, of any dimensions, are left out."""
    stored = (weight.parameter for weight in find_weights(model))
    known = {id(p) for held in stored for p in (held.parameters() if isinstance(held, nn.Module) else (held,))}
    found = {}
    for path, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is not None and p.dim() > 1 and p.numel() > max(p.shape) and id(p) not in known:
                known.add(id(p))
                found[Place(path, module, key).tensor_name] = f"a parameter {tuple(p.shape)} of {type(module).__name__}"
    return found


def some_of(names: Sequence[str]) -> str:
    """The first few of the names, for a message."""
    return ", ".join([*names[:_NAMED], "…"] if len(names) > _NAMED else names)


def warn_of_uncovered(model: nn.Module, strict: bool = False) -> None:
    """Log one warning that names the parameters that no rule can name; they stay dense, whatever `match` says.

    Raises:
        UserError: there are some, and `strict` is true.
    """
    left = uncovered(model)
    if left:
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        share = sum(sizes[name] for name in left) / sum(sizes.values())
        some = some_of([f"{name} ({why})" for name, why in left.items()])
        text = (
            f"{len(left)} weights ({share:.1%} of the parameters) stay as they are, since no rule covers modules of "
            f"their type: {some}; fairseq_quant_noise.cover makes a type known"
        )
        if strict:
            raise UserError(text)
        logger.warning(text)
