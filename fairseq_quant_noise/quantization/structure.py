"""Share and prune the layers of a model as a plan says."""

from torch import nn

from ..plan.rules import Structure
from ..structure.modules import keep_layers_, require_stacks, set_layerdrop, share_layers_, shared_chunk


def apply_structure(model: nn.Module, structure: Structure) -> dict[str, list[int]]:
    """Share, then prune, then set LayerDrop, as a plan's `structure` says, in place.

    Args:
        model: any network with a ModuleList `layers`.
        structure: the plan's.

    Returns:
        By stack, the layers that stayed, where some were to go.

    Raises:
        UserError: the structure does not fit the network (see `share_layers_` and `keep_layers_`).
    """
    if structure.share_layers > 1:
        share_layers_(model, structure.share_layers, structure.share_from)
    kept = keep_layers_(model, structure.keep_layers) if structure.keep_layers is not None else {}
    if structure.layerdrop is not None:
        for name, stack in require_stacks(model).items():
            set_layerdrop(model, name, stack, shared_chunk(stack), structure.layerdrop)
    return kept
