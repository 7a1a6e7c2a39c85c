"""Assign the optimizer's state to parameters by name when a checkpoint is loaded, as the weights are.

torch keeps that state by position: the first entry is the first parameter's, whatever its shape. A weight in int8 is a
module inside its layer, so that the layer's bias comes before it; in a dense network it comes after. So a dense run
that goes on with `--quant-noise-scalar` gave each weight the moments of its neighbour's bias, and the other way round.
The weights of a checkpoint are saved in the order of its parameters, which says whose each entry is.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.keys import FP32_COPIES
from ...layers.parts import LATENT


@contextmanager
def state_by_name(trainer: Any) -> Iterator[None]:
    """Put each optimizer state that the Trainer loads inside in the order of the model's parameters."""
    model, build = trainer.get_model(), trainer._build_optimizer
    saved: list[str] = []
    hook = model._register_load_state_dict_pre_hook(lambda state, *_: saved.extend(state))

    def build_optimizer() -> None:
        build()
        load = trainer._optimizer.load_state_dict
        trainer._optimizer.load_state_dict = lambda state, *rest: load(in_order(model, state, saved), *rest)

    trainer._build_optimizer = build_optimizer
    try:
        yield
    finally:
        hook.remove()
        trainer._build_optimizer = build
        if trainer._optimizer is not None:
            vars(trainer._optimizer).pop("load_state_dict", None)


def in_order(model: nn.Module, state: Mapping[str, Any], saved: Sequence[str]) -> Mapping[str, Any]:
    """Reorder the state of a torch optimizer, so that its entries follow the order of the parameters in `model`.

    Args:
        model: as it is trained now.
        state: of the optimizer, an entry a parameter or one flat tensor for all; others' parameters come after the
            model's.
        saved: the names of the model's weights in the order in which the checkpoint has them.

    Returns:
        `state` itself where the order is the same, or where the checkpoint has other parameters.
    """
    now = {n.removesuffix(f".{LATENT}"): p for n, p in model.named_parameters() if p.requires_grad}
    before = [name for name in saved if name in now]
    if before == [*now] or len(before) != len(now) or len(state["param_groups"]) != 1:
        return state
    positions = [before.index(name) for name in now]
    ids = state["param_groups"][0]["params"]
    if len(ids) == 1:
        sizes = [now[name].numel() for name in before]
        entries = {
            i: {name: _flat_in_order(value, sizes, positions) for name, value in entry.items()}
            for i, entry in state["state"].items()
        }
    else:
        ordered = _in_order(ids, positions)
        entries = {i: state["state"][j] for i, j in zip(ids, ordered, strict=True) if j in state["state"]}
    copies = {FP32_COPIES: _in_order(state[FP32_COPIES], positions)} if FP32_COPIES in state else {}
    return {**state, "state": entries, **copies}


def _in_order(values: Sequence[Any], positions: Sequence[int]) -> list[Any]:
    return [*(values[i] for i in positions), *values[len(positions) :]]


def _flat_in_order(value: Any, sizes: Sequence[int], positions: Sequence[int]) -> Any:
    """Reorder the parts, of these sizes, of a flat tensor; numbers stay as they are."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    parts = value.split([*sizes, value.numel() - sum(sizes)])
    return torch.cat(_in_order(parts, positions))
