"""Find the weights of a model that can be noised and quantized: each tensor once, with its ties.

Names are those of modules (`decoder.layers.0.fc1`); a plan's `match` is a full match over them. A tensor that two
modules hold (tied embeddings, a tied adaptive softmax) belongs to the first Linear, Embedding or Conv2d that holds
it; every other holder is an alias. Aliases may be of any type: what they do with the shared weight is theirs.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..errors import UserError
from .blocks import BLOCK_MODULES

logger = logging.getLogger(__name__)

WORTH_A_WORD = 0.01  # the least share of the parameters that a warning is given for
_NAMED = 4  # weights in the warning


@dataclass
class Weight:
    """One stored weight and the modules that hold it."""

    name: str  # the owner's module name
    module: nn.Module  # the owner: Linear, Embedding or Conv2d
    aliases: list[tuple[str, nn.Module]] = field(default_factory=list)  # the other holders, by module name
    other_names: list[str] = field(default_factory=list)  # holders under another name than `weight`

    @property
    def tensor_name(self) -> str:
        """The name in the state dict."""
        return tensor_name(self.name)

    def check_ties(self) -> None:
        """Refuse a tie that cannot be kept.

        Raises:
            UserError: a module holds this weight under another name than `weight`.
        """
        if self.other_names:
            raise UserError(
                f"{self.name}: its weight is also {self.other_names[0]}, and only ties between attributes called "
                "'weight' can be kept; rename that attribute, or leave this weight out of the plan"
            )

    @property
    def holders(self) -> list[tuple[str, nn.Module]]:
        """The owner and its aliases."""
        return [(self.name, self.module), *self.aliases]

    @property
    def stored(self) -> Tensor | nn.Module:
        """The stored Parameter, (rows, …), or the quantized weight that has taken its place."""
        return stored_weight(self.module)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense weight."""
        return tuple(self.stored.shape)  # type: ignore[arg-type]


def tensor_name(module_name: str) -> str:
    """`weight` of the module `module_name`; the model itself has the name ''."""
    return f"{module_name}.weight" if module_name else "weight"


def stored_weight(module: nn.Module) -> Tensor | nn.Module:
    """What `module` stores as `weight`: a Parameter, (rows, …), without noise, or a quantized weight, not decoded.

    Raises:
        KeyError: `module` stores no `weight`.
    """
    parameter = module._parameters.get("weight")
    return module._modules["weight"] if parameter is None else parameter  # type: ignore[return-value]


def _holds_weight(module: nn.Module) -> bool:
    parameter = module._parameters.get("weight")
    return (parameter is not None and parameter.dim() >= 2) or module._modules.get("weight") is not None


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


def find_weights(model: nn.Module) -> list[Weight]:
    """Every weight of `model` that has blocks, in the order of `named_modules`, ties joined.

    Weights that no Linear, Embedding or Conv2d holds (a LayerNorm's, a fused in_proj_weight) are not among them.
    """
    owners: dict[int, Weight] = {}
    orphans: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if not _holds_weight(module):
            continue
        key = id(stored_weight(module))
        if key in owners:
            owners[key].aliases.append((name, module))
        elif isinstance(module, BLOCK_MODULES):
            owners[key] = Weight(name, module)
        else:
            orphans.append((name, module))
    for name, module in orphans:  # held by some other type before its owner was met
        if id(stored_weight(module)) in owners:
            owners[id(stored_weight(module))].aliases.append((name, module))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in owners and name.rpartition(".")[2] != "weight":
            owners[id(parameter)].other_names.append(name)
    return list(owners.values())


def warn_of_uncovered(model: nn.Module) -> None:
    """Log one warning where more than a hundredth of the parameters lie in weights that no rule can name.

    Those are parameters of two or more dimensions outside the modules of `BLOCK_MODULES`: the in_proj_weight of torch's
    MultiheadAttention, an LSTM's, a Conv1d's, `Conv1D` of transformers. They stay dense, whatever `match` says.
    """
    stored = (weight.stored for weight in find_weights(model))
    covered = {id(p) for held in stored for p in (held.parameters() if isinstance(held, nn.Module) else (held,))}
    left = {name: p for name, p in model.named_parameters() if p.dim() > 1 and id(p) not in covered}
    total = sum(p.numel() for p in model.parameters())
    share = sum(p.numel() for p in left.values()) / max(total, 1)
    if share > WORTH_A_WORD:
        names = [*left][:_NAMED] + (["…"] if len(left) > _NAMED else [])
        logger.warning(
            f"{share:.0%} of the parameters are in weights that no rule can name, and stay as they are: "
            f"{', '.join(names)}; rules cover Linear, Embedding and Conv2d"
        )
