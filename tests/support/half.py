"""fairseq's own optimizers in every precision, on a CPU: the FP16Optimizer flattens as it does on a GPU."""

import contextlib
import copy
import itertools
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from fairseq import optim
from fairseq.optim import FP16Optimizer
from lm_fixture import split
from torch import is_tensor, nn

from fairseq_quant_noise.plugin.training.optimizer import carry_over

OPTIMIZERS = {
    "adam": split("--optimizer adam --adam-betas (0.9,0.98) --weight-decay 0.01"),
    "nag": split("--optimizer nag --momentum 0.9"),
    "sgd": split("--optimizer sgd --momentum 0.9"),
    "adafactor": split("--optimizer adafactor --beta1 0.9"),
}
PRECISIONS = {
    "fp32": [],
    "fp16": ["--fp16"],
    "fp16, not flat": ["--fp16", "--fp16-no-flatten-grads"],
    "memory-efficient fp16": ["--memory-efficient-fp16"],
    "bf16": ["--bf16"],
    "memory-efficient bf16": ["--memory-efficient-bf16"],
    "amp": ["--amp"],
}
SHAPES = {"first": (6, 4), "old": (5,), "new": (16, 2), "last": (3, 2, 4)}  # of the parameters of `network`
every_precision = pytest.mark.parametrize("precision", PRECISIONS)

_build_optimizer = FP16Optimizer.build_optimizer.__func__


@contextlib.contextmanager
def can_flatten() -> Iterator[None]:
    """FP16Optimizer can flatten: fairseq asks CUDA for the number of the parameters' device, and a CPU's is None."""
    with mock.patch("torch.cuda.current_device", return_value=torch.device("cpu").index):
        yield


@contextlib.contextmanager
def flattening() -> Iterator[None]:
    """It does so in every run; a run on a CPU is given --fp16-no-flatten-grads otherwise."""

    def build(cls, cfg, params, **kwargs):
        cfg.common.fp16_no_flatten_grads = False
        built = _build_optimizer(cls, cfg, params, **kwargs)
        assert built.has_flat_params
        return built

    with can_flatten(), mock.patch.object(FP16Optimizer, "build_optimizer", classmethod(build)):
        yield


def build(lab, name, precision, parameters):
    """fairseq's optimizer of this name and precision, as the Trainer builds it."""
    cfg = copy.deepcopy(lab.config(*OPTIMIZERS[name]))
    flags = PRECISIONS[precision]
    for key in ("fp16", "bf16", "amp", "memory_efficient_fp16", "memory_efficient_bf16", "fp16_no_flatten_grads"):
        cfg.common[key] = f"--{key.replace('_', '-')}" in flags
    cfg.common.fp16 |= cfg.common.memory_efficient_fp16
    cfg.common.bf16 |= cfg.common.memory_efficient_bf16
    if "memory" in precision:
        return optim.MemoryEfficientFP16Optimizer.build_optimizer(cfg, parameters)
    if precision == "amp":
        return optim.AMPOptimizer.build_optimizer(cfg, parameters)
    if precision == "fp32":
        return optim.build_optimizer(cfg.optimizer, parameters)
    return optim.FP16Optimizer.build_optimizer(cfg, parameters)


def network(precision, names, seed=0):
    """Parameters of some shapes, in the dtype of this precision."""
    dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "fp16" in precision else torch.float32
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return nn.ParameterDict({name: nn.Parameter(made[name]) for name in SHAPES if name in names})


def step(optimizer, model, updates):
    """Updates whose gradients depend on the parameter and the update alone."""
    for update in updates:
        optimizer.zero_grad()
        loss = torch.zeros(())
        for name, parameter in model.items():
            generator = torch.Generator().manual_seed(1000 * list(SHAPES).index(name) + update)
            loss = loss + (parameter * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)).sum()
        optimizer.backward(loss)
        optimizer.multiply_grads(0.5)
        optimizer.clip_grad_norm(0.0)
        optimizer.step()


def memory(optimizer, model):
    """By the parameter's name what is kept of it, in its shape: the state, and the fp32 copy where there is one."""
    wrapped = getattr(optimizer, "fp32_optimizer", getattr(optimizer, "wrapped_optimizer", optimizer))
    parameters, copies = list(model.values()), getattr(optimizer, "fp32_params", None)
    if isinstance(copies, dict):
        (flat,) = copies.values()
        kept = {**wrapped.optimizer.state.get(flat, {}), "stepped": flat.detach()}
        ends = list(itertools.accumulate(p.numel() for p in parameters))
        found = [
            {k: v[end - p.numel() : end].view(p.shape) if is_tensor(v) else v for k, v in kept.items()}
            for p, end in zip(parameters, ends, strict=True)
        ]
    else:
        stepped = parameters if copies is None else copies
        found = [{**wrapped.optimizer.state.get(t, {}), "stepped": t.detach()} for t in stepped]
    cloned = [{k: v.clone() if is_tensor(v) else v for k, v in entry.items()} for entry in found]
    return dict(zip(model, cloned, strict=True))


def warmed_up(optimizer, model, updates=5):
    """Some updates at a learning rate that is not the one it was built with."""
    optimizer.set_lr(0.005)
    step(optimizer, model, range(updates))


def across_a_stage(lab, name, precision, updates=5):
    """A network that has lost `first` for `new` after some updates, and its optimizer."""
    model = network(precision, ("first", "old", "last"))
    optimizer = build(lab, name, precision, list(model.values()))
    warmed_up(optimizer, model, updates)
    new = network(precision, ("new",))["new"]
    quantized = nn.ParameterDict({"new": new, "old": model["old"], "last": model["last"]})
    rebuilt = build(lab, name, precision, list(quantized.values()))
    carry_over(optimizer, rebuilt)
    return quantized, rebuilt


def every_optimizer(precision):
    """Those that fairseq can build in this precision: it flattens no adafactor, and has no memory-efficient sgd."""
    missing = {"fp16": "adafactor", "memory-efficient fp16": "sgd", "memory-efficient bf16": "sgd"}
    return [name for name in OPTIMIZERS if name != missing.get(precision)]
