"""Save all the state of a half-precision training in checkpoints, so that it resumes with the same bits.

fairseq's FP16Optimizer (`--fp16`, `--bf16`) steps fp32 copies of the weights, and its checkpoints hold the weights
alone: a run that resumes starts from rounded copies. Of the loss scale they hold the value, but not when it is due to
grow; with `--amp` neither. Here they hold all of it, at 4 more bytes per parameter.

The optimizer's state lies in one flat tensor with `--fp16`, or one by one for each parameter, as after a stage
(`optimizer.py`) and with `--fp16-no-flatten-grads`. Either form loads into an optimizer of either form.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fairseq.optim import AMPOptimizer
from fairseq.optim.fp16_optimizer import _FP16OptimizerMixin, _MemoryEfficientFP16OptimizerMixin
from torch import nn

from ...checkpoints.keys import FP32_COPIES, SCALER
from .optimizer import copied_part, part_of, slices_of, step_apart

#: fairseq's classes of optimizers in half precision, each with its own way to write and read a state.
OPTIMIZERS: tuple[Any, ...] = (_FP16OptimizerMixin, _MemoryEfficientFP16OptimizerMixin, AMPOptimizer)


def state_dict(optimizer: Any, of_fairseq: Any) -> dict[str, Any]:
    """Add each parameter's fp32 copy and the whole loss scaler to fairseq's state of a half-precision optimizer."""
    state: dict[str, Any] = of_fairseq(optimizer)
    if hasattr(optimizer, "fp32_params"):
        places = slices_of(optimizer)
        pairs = ((places[id(p)], p.shape) for p in optimizer.fp16_params)
        state[FP32_COPIES] = [part_of(stepped.data, cut, shape) for (stepped, cut), shape in pairs]
    if optimizer.scaler is not None:
        state[SCALER] = _state_of(optimizer.scaler)
    return state


def load_state_dict(optimizer: Any, state: Mapping[str, Any], overrides: Any = None, *, of_fairseq: Any) -> None:
    """Take back what `state_dict` gave, in either form; or what fairseq gives without this package.

    A copy that does not round to its weight is ignored: the weight has changed, to a mean of checkpoints, say.
    """
    is_wrapped = hasattr(optimizer, "fp32_params")
    of_fairseq(optimizer, _in_form(optimizer, state) if is_wrapped else state, overrides)
    if is_wrapped:
        places = slices_of(optimizer)
        for parameter, copy in zip(optimizer.fp16_params, state.get(FP32_COPIES, ()), strict=False):
            stepped, cut = places[id(parameter)]
            own = copy.to(parameter.device)
            if torch.equal(own.to(parameter.dtype), parameter.data):
                part_of(stepped.data, cut, parameter.shape).copy_(own)
    if optimizer.scaler is not None:
        _load_into(optimizer.scaler, state.get(SCALER, {}))


def _state_of(scaler: Any) -> dict[str, Any]:
    """Return what changes in fairseq's loss scaler, or in torch's, which is empty where there is no GPU."""
    state = vars(scaler) if not isinstance(scaler, torch.amp.GradScaler) else scaler.state_dict()
    return {name: value for name, value in state.items() if name.startswith("_") or name == "scale"}


def _load_into(scaler: Any, state: Mapping[str, Any]) -> None:
    known = {name: state[name] for name in _state_of(scaler) if name in state}
    if not isinstance(scaler, torch.amp.GradScaler):
        vars(scaler).update(known)
    elif known:
        scaler.load_state_dict({**scaler.state_dict(), **known})


def _in_form(optimizer: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Convert the state to the optimizer's form; or give a flat optimizer the form of a state that is not flat."""
    saved = sum(len(group["params"]) for group in state["param_groups"])
    parameters, copies = optimizer.fp16_params, optimizer.fp32_params
    if saved == len(parameters) != len(copies):
        step_apart(optimizer)
    return _apart(state, parameters) if saved == 1 < len(copies) else state


def _apart(state: Mapping[str, Any], parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """Split the state of one flat tensor into a state for each of the parameters, which lie in it end to end."""
    found: dict[int, dict[str, Any]] = {}
    (flat,) = state["state"].values() or [{}]
    start = 0
    for i, parameter in enumerate(parameters):
        cut = slice(start, start + parameter.numel())
        start = cut.stop
        found[i] = {name: copied_part(value, cut, parameter.shape) for name, value in flat.items()}
    groups = [{**state["param_groups"][0], "params": list(found)}]
    return {**state, "state": found, "param_groups": groups}
