"""The noise as operators of torch, so that torch.compile takes a training forward without a break for each weight.

A graph calls `begin` where a forward of the model begins, and `noised` where it reads a weight. Both run the code that
runs without a graph, and take their random numbers from the same generators: the noise is the same, bit for bit.
"""

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_NUMBERS = itertools.count()
_DRAWS: WeakValueDictionary[int, Any] = WeakValueDictionary()


def register(draw: Any) -> int:
    """A number by which the operators find the noise of a model; a copy of it needs one of its own."""
    number = next(_NUMBERS)
    _DRAWS[number] = draw
    return number


@torch.library.custom_op("fairseq_quant_noise::begin", mutates_args=())
def begin(last: Tensor, draw: int) -> Tensor:
    """Draw the seed of a forward, (1,), by the noise of number `draw`.

    `last`, the seed of the forward before, only keeps the calls of a graph in their order.
    """
    found: Tensor = _DRAWS[draw].begin()
    return found.clone()


@torch.library.custom_op("fairseq_quant_noise::noised", mutates_args=())
def noised(stored: Tensor, seed: Tensor, draw: int, name: str) -> Tensor:
    """The weight `name`, of any shape (…), as a forward with this seed, (1,), reads it."""
    found: Tensor = _DRAWS[draw].weights[name].by_seed(stored.detach(), int(seed))
    return stored.new_empty(stored.shape).copy_(found)


@torch.library.custom_op("fairseq_quant_noise::spend", mutates_args=())
def spend(gradient: Tensor, draw: int) -> Tensor:
    """A copy of a noised weight's gradient, (…); notes that backward has begun, so that the next forward draws anew."""
    _DRAWS[draw].spent = True
    return gradient.clone()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.draw = inputs[2]


def _back(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return spend(gradient, ctx.draw), None, None, None


begin.register_fake(lambda last, draw: torch.empty_like(last))
noised.register_fake(lambda stored, seed, draw, name: stored.new_empty(stored.shape))
spend.register_fake(lambda gradient, draw: torch.empty_like(gradient))
noised.register_autograd(_back, setup_context=_keep)
