"""Carry over the optimizer's state when a stage replaces some of the parameters.

fairseq builds a new optimizer whenever the parameters change and so forgets momenta, second moments and fp32 master
copies of all the parameters that did not. Here the state of every surviving parameter is kept; new centroids
start fresh.

`--fp16` steps one flat fp32 tensor that holds all parameters end to end, with one count of steps for Adam's bias
correction: under a steady gradient, new centroids, whose moments are zero, would make steps of up to 1.55 times the
learning rate (betas .9, .98) or 6.6 times (.9, .999). So from the first stage on each parameter has an fp32 copy and a
state of its own, as fairseq has it with `--bf16` and with `--fp16-no-flatten-grads`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...quantization.importance import MOMENTS


def _torch_optimizer(fairseq_optimizer: Any) -> torch.optim.Optimizer:
    """Find the innermost torch optimizer of a fairseq optimizer (fp16 and amp wrap it)."""
    inner = fairseq_optimizer
    for attribute in ("fp32_optimizer", "wrapped_optimizer"):
        inner = getattr(inner, attribute, None) or inner
    return inner.optimizer


def slices_of(optimizer: Any) -> dict[int, tuple[Tensor, slice | None]]:
    """Map each model parameter (by id) to the tensor that the torch optimizer steps and the parameter's slice of it.

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


def part_of(value: Any, cut: slice | None, shape: Sequence[int]) -> Any:
    """Cut out the part of an optimizer-state entry that belongs to one parameter, in its shape; numbers stay."""
    if cut is None or not isinstance(value, Tensor):
        return value
    return value if value.dim() == 0 else value.flatten()[cut].view(shape)


def copied_part(value: Any, cut: slice, shape: Sequence[int]) -> Any:
    """Copy what `part_of` returns, so that the flat tensor can be freed."""
    own = part_of(value, cut, shape)
    return own.clone() if isinstance(own, Tensor) else own


def adam_moments(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Collect Adam's second moments of the model's parameters; empty for an optimizer without them.

    Returns:
        By the parameter's name, a tensor of its shape, such as (out, in) for a Linear, also where the optimizer steps
        one flat (numbers of all parameters,) tensor.
    """
    states, found = _torch_optimizer(optimizer).state, {}
    places = slices_of(optimizer)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in places:
            stepped, cut = places[id(parameter)]
            if MOMENTS in states.get(stepped, {}):
                found[name] = part_of(states[stepped][MOMENTS], cut, parameter.shape)
    return found


def carry_over(old: Any, new: Any) -> None:
    """Copy the state of the parameters that both fairseq optimizers hold, from `old` to `new`, in place.

    `new` is as it was built, and steps each parameter by itself afterwards. Hyperparameters of the first parameter
    group (nag keeps its last learning rate there) come along.

    Raises:
        UserError: the optimizer is apex's FusedAdam, which counts the steps of all parameters together.
    """
    step_apart(new)
    source, target = _torch_optimizer(old), _torch_optimizer(new)
    if type(target).__name__ == "FusedAdamV2":  # fairseq's, of apex; there only where apex is
        raise UserError(
            "--optimizer adam: apex's FusedAdam counts the steps of all weights together, and new centroids must start "
            "at 0; give --use-old-adam too"
        )
    kept = {k: v for k, v in source.param_groups[0].items() if k != "params"}
    for group in target.param_groups:
        group.update(kept)
    before, after = slices_of(old), slices_of(new)
    for key in before.keys() & after.keys():
        (from_, cut), (to, _) = before[key], after[key]
        if from_ is not to:  # fp32 master copies: more digits than the half-precision parameter
            to.data.copy_(part_of(from_.data, cut, to.shape))
        for name, value in source.state.get(from_, {}).items():
            target.state[to][name] = value if cut is None else copied_part(value, cut, to.shape)
    for name in ("scaler", "_grad_scaler"):  # fp16's name and amp's
        if name in vars(old) and name in vars(new):
            setattr(new, name, vars(old)[name])


def step_apart(optimizer: Any) -> None:
    """Let an FP16Optimizer that has not stepped yet step an fp32 copy of each parameter instead of a flat tensor."""
    if isinstance(getattr(optimizer, "fp32_params", None), dict):
        optimizer.fp32_params = optimizer.build_fp32_params(None, optimizer.fp16_params, flatten=False)
        _torch_optimizer(optimizer).param_groups[0]["params"] = optimizer.fp32_params
