"""A model made ready for a state that holds quantized weights."""

from collections.abc import Mapping

from torch import Tensor, nn

from ..weights.discovery import find_weights
from .inputs import adopt_input_quantizers
from .quantized import quantized_weights
from .registry import join_, recognise


def adopt_quantized(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Make every weight of `model` that `state` holds quantized one of that form, ready to load `state`.

    Returns:
        The names of the modules that changed.

    Raises:
        UserError: the codes do not fit the weight's shape, or a weight in training would have to come from codes.
    """
    changed = []
    for weight in find_weights(model):
        held = recognise(state, weight.tensor_name)
        if held is not None and held.format.adopt(weight, held.parts):
            changed.append(weight.name)
    join_(quantized_weights(model).values())
    adopt_input_quantizers(model, state)
    return changed
