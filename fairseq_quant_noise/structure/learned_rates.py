"""Learn how often each layer stays under LayerDrop, to prune those that are needed least.

The third strategy of LayerDrop, data driven pruning (arXiv 1909.11556): each layer has a drop rate of its own, the
mean over the layers stays p, and pruning keeps the layers with the highest keep rates. With a learned score s_i for
each chunk of layers,

    k_i = sigmoid(s_i + b),  b such that the mean of all k_i is 1 - p            keep rate
    m_i ~ Bernoulli(k_i),    x_(i+1) = x_i + m_i (f_i(x_i) - x_i)                 training forward
    dL/dk_i ~ <dL/dx_(i+1), f_i(x_i) - x_i> / (2 P(m_i))                          backward

The last line is the mean of the derivatives at m_i = 0 and m_i = 1, of which each draw shows one: the trapezoid rule
for L(m_i = 1) - L(m_i = 0). The derivative at 1 alone says nothing of a trained layer, which has made it 0. So a layer
that is left out still runs, without gradients. The paper computes the rates from activations; here a score is a
parameter, so that a rate does not depend on the input.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .modules import SCORES, LayerStack, layers_in, require_stacks, set_stack, shared_chunk

_LEAST = 0.02  # of a rate and of its complement, so that each layer is seen both in use and left out
_HALVINGS = 40  # of the interval in which b lies


class _Gate(torch.autograd.Function):
    """The input or the output of a layer, as `kept` says, with the gradient of the layer's keep rate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, rate: Tensor, kept: bool) -> Tensor:
        """y, (…), where the layer is kept, else x of the same shape; `rate` is ()."""
        ctx.save_for_backward(x, y, rate)
        ctx.kept = kept
        return (y if kept else x).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, None]:
        """The gradient of what was passed on goes to it, (…); that of the rate is as in the module's docstring."""
        x, y, rate = ctx.saved_tensors
        drawn = rate if ctx.kept else 1 - rate
        product = (gradients[0].float() * (y.float() - x.float())).sum() / (2 * drawn)
        passed = gradients[0]
        return None if ctx.kept else passed, passed if ctx.kept else None, product.to(rate.dtype), None


class LearnedLayerStack(LayerStack):
    """A stack of layers under LayerDrop, whose keep rates are learned.

    Args:
        layers: in their order; each takes its input first, and returns a tensor like it, alone or first of a tuple.
        chunk: adjacent layers that stay or go together.
        p: the mean over the chunks of the probability of leaving one out.
    """

    def __init__(self, layers: Iterable[nn.Module], chunk: int, p: float) -> None:
        super().__init__(layers, chunk, p)
        self.register_parameter(SCORES, nn.Parameter(torch.zeros(-(-len(self) // chunk))))
        self._drawn: dict[nn.Module, tuple[Tensor, bool]] = {}  # of each layer in this forward: its rate, whether kept
        for layer in layers_in(self):
            layer.register_forward_pre_hook(self._before)
            layer.register_forward_hook(self._after, with_kwargs=True, always_call=True)

    keep_scores: nn.Parameter | None

    def forget(self) -> None:
        """Leave layers out at equal rates from now on; the scores are gone."""
        self.register_parameter(SCORES, None)

    def keep_rates(self) -> Tensor:
        """The probability that a chunk stays, (chunks,) float32, with gradients."""
        assert self.keep_scores is not None
        return keep_rates(self.keep_scores, self.p)

    def __iter__(self) -> Iterator[nn.Module]:
        """All layers; in training, those that are left out pass their input on."""
        self._drawn = {}
        if self.keep_scores is None:
            yield from super().__iter__()
            return
        layers = layers_in(self)
        if self.training:
            rates = self.keep_rates()
            kept = (torch.rand(len(rates)) < rates.detach().cpu()).tolist()
            numbers = [i // self.chunk for i in range(len(layers))]
            self._drawn = {layer: (rates[n], kept[n]) for layer, n in zip(layers, numbers, strict=True)}
        yield from layers

    def _before(self, module: nn.Module, args: object) -> None:
        if module in self._drawn and not self._drawn[module][1]:
            self._gradients = torch.is_grad_enabled()
            torch.set_grad_enabled(False)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if module not in self._drawn:
            return output
        rate, kept = self._drawn.pop(module)
        if not kept:
            torch.set_grad_enabled(self._gradients)
        if output is None:  # the layer raised an error
            return output
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(output, tuple):
            return (_Gate.apply(x, output[0], rate, kept), *output[1:])  # type: ignore[no-untyped-call]
        return _Gate.apply(x, output, rate, kept)  # type: ignore[no-untyped-call]


def keep_rates(scores: Tensor, p: float) -> Tensor:
    """Keep rates (n,) float32 of scores (n,), whose mean is 1 - p; differentiable.

    Each is at least .02 and at most .98, or nearer to 0 and 1 where p is.
    """
    scores = scores.float()
    least = min(_LEAST, p / 2, (1 - p) / 2)
    mean = (1 - p - least) / (1 - 2 * least)  # of the sigmoids
    with torch.no_grad():
        logit = torch.logit(torch.tensor(mean)).item()
        low, high = logit - scores.max(), logit - scores.min()  # between which b lies
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            above = torch.sigmoid(scores + middle).mean() > mean
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        b = (low + high) / 2
        slope = torch.sigmoid(scores + b) * torch.sigmoid(-scores - b)  # (n,)
    # b's value is found; a step of Newton, which moves it by nothing, gives it its derivative.
    b = b - (torch.sigmoid(scores + b) - mean).mean() / slope.mean().clamp(min=1e-30)
    return least + (1 - 2 * least) * torch.sigmoid(scores + b)


def learn_layerdrop_(model: nn.Module, p: float | None = None) -> nn.Module:
    """Train `model` with LayerDrop and learn which layers are needed, in place; returns `model`.

    Call it after `share_layers_` and before the optimizer is made, of which the scores are parameters. Then
    `keep_layers_(model, "learned")` keeps the layers that are.

    Args:
        model: any network with a ModuleList `layers`, over which its forward iterates.
        p: the probability of leaving a layer out, on average over the layers of a stack; without it, only stacks that
            have LayerDrop learn, each at its own p.

    Raises:
        UserError: the model has no stack, or p is not between 0 and 1.
    """
    for name, stack in require_stacks(model).items():
        mean = float(getattr(stack, "p", 0) or 0) if p is None else p
        if p is not None and not 0 < p < 1:
            raise UserError(f"learn_layerdrop_: p is {p!r}; give a probability between 0 and 1")
        if 0 < mean < 1:
            set_stack(model, name, LearnedLayerStack(layers_in(stack), shared_chunk(stack), mean))
    return model


def without_scores(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state, tensors of any shape by name, without the learned scores, which only a training needs."""
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] != SCORES}
