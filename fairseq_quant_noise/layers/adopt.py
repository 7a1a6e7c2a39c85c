"""Prepare a model to load a state that holds quantized weights."""

from collections.abc import Mapping

from torch import Tensor, nn

from ..weights.discovery import find_weights
from .inputs import adopt_input_quantizers
from .quantized import quantized_weights
from .registry import join_, recognise


def adopt_quantized(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Bring every weight of `model` that `state` holds quantized into that format, ready to load `state`.

    Args:
        model: with these weights dense, (rows, …), or quantized.
        state: by name, dense tensors and the entries of quantized weights (`Format.entries`).

    Returns:
        The names of the modules that changed.

    Raises:
        UserError: the codes do not fit the weight's shape, the state trains a weight that the model has in codes alone,
            or weights with one codebook number differ in their codebook's shape or bits.
        DamagedFileError: an entry that says the bits and the range of codes holds something else.
    """
    changed = []
    for weight in find_weights(model):
        held = recognise(state, weight.tensor_name)
        if held is not None and held.format.adopt(weight, held.parts):
            changed.append(weight.name)
    join_(quantized_weights(model).values())
    adopt_input_quantizers(model, state)
    return changed
