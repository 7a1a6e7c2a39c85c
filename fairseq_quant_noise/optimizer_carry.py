"""The optimizer's memory, carried over when a stage replaces some of the parameters.

fairseq builds a new optimizer whenever the parameters change and so forgets momenta, second moments and fp32 master
copies of all the parameters that did not. Here the state of every surviving parameter is kept; new centroids
start fresh.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .importance import MOMENTS


def _torch_optimizer(fairseq_optimizer: Any) -> torch.optim.Optimizer:
    """The innermost torch optimizer of a fairseq optimizer (which fp16 and amp wrap)."""
    inner = fairseq_optimizer
    for attribute in ("fp32_optimizer", "wrapped_optimizer"):
        inner = getattr(inner, attribute, None) or inner
    return inner.optimizer


def _slices(optimizer: Any) -> dict[int, tuple[Tensor, slice | None]]:
    """For each model parameter (by id) the tensor that the torch optimizer steps, and which slice of it is its own.

    fairseq's FP16Optimizer flattens all parameters into one fp32 tensor a device, or keeps an fp32 copy of each.
    """
    masters = getattr(optimizer, "fp32_params", None)
    if masters is None:
        return {id(p): (p, None) for group in _torch_optimizer(optimizer).param_groups for p in group["params"]}
    parameters: list[nn.Parameter] = optimizer.fp16_params
    if not isinstance(masters, dict):
        return {id(p): (m, None) for p, m in zip(parameters, masters, strict=True)}
    found: dict[int, tuple[Tensor, slice | None]] = {}
    offsets = dict.fromkeys(masters, 0)
    for p in parameters:
        key = p.device.index if p.device.index in masters else p.device
        key = key if key in masters else next(iter(masters))
        found[id(p)] = (masters[key], slice(offsets[key], offsets[key] + p.numel()))
        offsets[key] += p.numel()
    return found


def second_moments(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Adam's second moments of the model's parameters in a fairseq optimizer, by name; none of an optimizer without."""
    states, found = _torch_optimizer(optimizer).state, {}
    places = _slices(optimizer)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in places:
            stepped, cut = places[id(parameter)]
            if MOMENTS in states.get(stepped, {}):
                found[name] = _part(states[stepped][MOMENTS], cut)
    return found


def _part(value: Tensor, cut: slice | None) -> Tensor:
    return value if cut is None or value.dim() == 0 else value.flatten()[cut]


def carry_over(old: Any, new: Any) -> None:
    """Copy the state of the parameters that both fairseq optimizers hold, from `old` to `new`, in place.

    Hyperparameters of the first parameter group (nag keeps its last learning rate there) come along.
    """
    source, target = _torch_optimizer(old), _torch_optimizer(new)
    kept = {k: v for k, v in source.param_groups[0].items() if k != "params"}
    for group in target.param_groups:
        group.update(kept)
    before, after = _slices(old), _slices(new)
    for key in before.keys() & after.keys():
        (from_, cut_from), (to, cut_to) = before[key], after[key]
        if from_ is not to:  # fp32 master copies: more digits than the half-precision parameter
            _part(to.data, cut_to).copy_(_part(from_.data, cut_from))
        for name, value in source.state.get(from_, {}).items():
            _carry_entry(target.state[to], name, value, to, cut_from, cut_to)
    for name in ("scaler", "_grad_scaler"):  # of fp16 and of amp
        if name in vars(old) and name in vars(new):
            setattr(new, name, vars(old)[name])


def _carry_entry(state: Any, name: str, value: Any, to: Tensor, cut_from: slice | None, cut_to: slice | None) -> None:
    if not isinstance(value, Tensor) or value.dim() == 0 or cut_to is None:
        state[name] = value
        return
    if name not in state:  # a flat tensor: new parameters' part stays zero
        state[name] = torch.zeros_like(to, dtype=value.dtype)
    _part(state[name], cut_to).copy_(_part(value, cut_from))
