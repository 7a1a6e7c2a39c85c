"""Measure the inputs of a model's layers, and encode their weights with error feedback (`pq/feedback.py`).

The metric M of a layer has the second moments of its inputs, H = E[x x^T], with the correlations damped:

    M_ii = H_ii,    M_ij = (1 - damping) H_ij

For a convolution, x is what a kernel sees at one place, I = C / groups * kernel numbers; groups, as the channels of a
depthwise convolution, share the mean H of all. Where batch normalisation follows, H is that of x - E[x].
Rows count by the mean importance of their numbers, where there is any.
A weight that an embedding looks up and a product multiplies by (the output projection of a language model) costs in
both uses. In the first, the errors of a row's numbers do not depend on one another as far as is known. So half of the
correlations is left, and M_ii is the mean importance of column i, where there is any.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.batch_statistics import batch_norms
from ..layers.inputs import FAST_PATH_OFF, is_product
from ..pq.encode import Encoded
from ..pq.feedback import Layer, refined
from ..scalar import LEARNED_RANGES, Affine, bits_of, fit_affine
from ..scalar.feedback import refined as refined_affine
from ..utils.modes import evaluating
from ..weights.discovery import Weight, find_weights
from .targets import Target

LOOKED_UP = 0.5  # share of the correlations that is left to a weight that is looked up, too
NO_CORRELATIONS, NO_GAIN = "no correlations to feed errors back by", "no gain by error feedback"  # for the log
_NOISE = 1e-10  # a share of the squared means below which a variance is rounding
_LEAST = 1e-4  # M_ii and g_r, at least, as a share of their means


@contextmanager
def measuring_inputs(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Measure, over the forwards inside, what the weights `names` are multiplied by; the model is in eval mode.

    Args:
        model: dense.
        names: what a plan calls the weights. Those that no module multiplies an input of its own by (an embedding's,
            the projections inside `nn.MultiheadAttention`) are left out, as those that no input reaches, and those of
            transposed and three-dimensional convolutions.

    Yields:
        By the tensor's name E[x x^T], (I, I) float32; where batch normalisation follows, that of x - E[x], with the
        means of each group of channels. Complete after the context.
    """
    wanted, sums = set(names), _Sums()
    handles = []
    for weight in find_weights(model):
        for module in _products(weight) if weight.name in wanted else ():
            hook = partial(sums.add, weight.tensor_name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            handles.append(module.register_forward_hook(partial(sums.leave, weight.tensor_name)))
    for norm in batch_norms(model).values():
        handles.append(norm.register_forward_pre_hook(sums.normed))
    # An attention may have a way past its projections, which a forward takes that needs none of them.
    fast = {module: module.__dict__[FAST_PATH_OFF] for module in model.modules() if FAST_PATH_OFF in module.__dict__}
    for module in fast:
        module.__dict__[FAST_PATH_OFF] = True
    try:
        with evaluating(model):
            yield sums.found
    finally:
        for handle in handles:
            handle.remove()
        for module, off in fast.items():
            module.__dict__[FAST_PATH_OFF] = off
    sums.finish()


class _Sums:
    """The inputs' second moments while they are summed up.

    A batch normalisation takes away the mean of each output, and is estimated anew on the quantized network. So what
    only moves that mean costs nothing, and the inputs' means are left out where every output goes to one.
    """

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}  # by the tensor's name, sum of y y^T: (I, I); y = x - shift
        self._shifts: dict[str, Tensor] = {}  # means of the first inputs, of each group: (groups, I)
        self._sums: dict[str, Tensor] = {}  # of y, of each group: (groups, I)
        self._counts: dict[str, int] = {}
        self._outputs: dict[str, int] = {}  # outputs that went to no batch normalisation
        self._last: tuple[str, object] = "", None  # a weight and the output that it has just made

    def add(self, name: str, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Add a module's first argument, (..., I) or images."""
        given = next(iter([*args, *kwargs.values()]), None)
        if not isinstance(given, Tensor) or not given.is_floating_point():
            return
        given = given.detach().float()
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            batched = given if given.dim() > len(module.kernel_size) + 1 else given[None]
            parts: Iterable[Tensor] = _windows(module, batched)
        else:
            parts = [given.flatten(0, -2)[None]]
        for x in parts:  # (groups, n, I)
            if not bool(x.isfinite().all()):
                continue
            shift = self._shifts.setdefault(name, x.mean(1))  # or large means would hide small variances in float32
            y = x - shift[:, None]
            flat, sums = y.flatten(0, 1), y.sum(1)
            self.found[name] = self.found[name].addmm_(flat.t(), flat) if name in self.found else flat.t() @ flat
            self._sums[name] = self._sums[name].add_(sums) if name in self._sums else sums
            self._counts[name] = self._counts.get(name, 0) + len(flat)

    def leave(self, name: str, module: nn.Module, args: object, output: object) -> None:
        """A module has made an output of a weight."""
        self._outputs[name] = self._outputs.get(name, 0) + 1
        self._last = name, output

    def normed(self, module: nn.Module, args: tuple[object, ...]) -> None:
        """A batch normalisation takes an input."""
        name, output = self._last
        if args and args[0] is output:
            self._outputs[name] -= 1

    def finish(self) -> None:
        """Turn sums into means."""
        for name, count in self._counts.items():
            groups = len(self._sums[name])
            means = self._sums[name].double() * (groups / count)  # of y
            found = self.found[name].double() / count - means.t() @ means / groups
            means += self._shifts[name]  # of x
            if self._outputs.get(name) != 0:
                found += means.t() @ means / groups
            if found.trace() > _NOISE * means.square().sum():
                self.found[name] = found.float()
            else:
                del self.found[name]  # nothing but zeros has reached it, or nothing but their mean
        self._last = "", None


def feeds_back(target: Target) -> bool:
    """Whether error feedback can encode the weight; a histogram's range is searched for again, and would be another."""
    return target.rule.format.has_codebook or target.rule.range != "histogram"


def _products(weight: Weight) -> list[nn.Module]:
    """The modules that multiply inputs by the weight: (O, I), or (O, C, ...) of convolutions over lines or images."""
    if not isinstance(weight.stored, Tensor):
        return []
    modules = [place.module for place in weight.places if is_product(place)]
    if weight.stored.dim() == 2:
        return [module for module in modules if not getattr(module, "transpose", False)]
    return [module for module in modules if isinstance(module, nn.Conv1d | nn.Conv2d)]


def _windows(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Iterator[Tensor]:
    """What a convolution's kernels see of its input x, (N, C, W) or (N, C, H, W): for each image (groups, places, I).

    A module that pads in its own way, as timm's for TensorFlow's padding, is seen without its padding, but for images
    smaller than the kernel.
    """
    size, stride, dilation = module.kernel_size, module.stride, module.dilation
    sides: list[int] = []  # before and after, of the last dimension first
    for i in reversed(range(len(size))):
        around = (size[i] - 1) * dilation[i]
        named = {"same": around, "valid": 0}
        both = named[module.padding] if isinstance(module.padding, str) else 2 * module.padding[i]
        both = max(both, around + 1 - x.shape[i + 2])
        sides += [both // 2, both - both // 2]
    if any(sides):
        x = F.pad(x, sides, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    if len(size) == 1:
        x, size, stride, dilation = x[:, :, None], (1, *size), (1, *stride), (1, *dilation)
    for image in x:  # one by one: windows take a kernel's size times the memory of the image
        groups = image.unflatten(0, (module.groups, -1))  # (groups, C / groups, H, W)
        yield F.unfold(groups, size, dilation, stride=stride).transpose(1, 2)


@dataclass(frozen=True)
class Feedback:
    """What error feedback needs."""

    inputs: Mapping[str, Tensor]  # by the tensor's name, E[x x^T] of the inputs it is multiplied by: (I, I)
    damping: float  # share of the correlations that is left out

    def reaches(self, targets: Sequence[Target]) -> bool:
        """Whether the inputs of all of these weights are known, and their formats can be encoded so."""
        return all(feeds_back(target) and target.weight.tensor_name in self.inputs for target in targets)

    def refined(
        self, targets: Sequence[Target], found: Sequence[Encoded], importance: Sequence[Tensor | None]
    ) -> tuple[list[tuple[Tensor, Tensor]], str]:
        """Codes (O, I/d) and centroids (K, d) of weights of one codebook; those of k-means, if none are better.

        Args:
            targets: the weights, whose inputs are known.
            found: of each the codes and centroids of k-means.
            importance: of each a tensor (O, I), as its blocks lie, or None.

        Returns:
            For each weight codes and centroids; and a few words for the log.
        """
        pairs = [(one.codes, one.centroids) for one in found]
        given = [None if None in importance else counts for counts in importance]
        layers = [self._layer(target.weight, counts) for target, counts in zip(targets, given, strict=True)]
        mean = torch.cat([layer.rows for layer in layers]).mean()
        layers = [Layer(layer.weight, layer.metric, layer.rows / mean) for layer in layers]
        if not any(layer.correlated for layer in layers):
            return pairs, NO_CORRELATIONS
        codes, centroids = refined(layers, found[0].centroids)
        before = sum(_loss(layer, *pair) for layer, pair in zip(layers, pairs, strict=True))
        after = sum(_loss(layer, part, centroids) for layer, part in zip(layers, codes, strict=True))
        if not after < before:
            return pairs, NO_GAIN
        return [(part, centroids) for part in codes], _gain(after, before)

    def rounded(self, target: Target, importance: Tensor | None) -> tuple[tuple[Tensor, Affine] | None, str]:
        """A weight of intN as numbers that lie on codes, (rows, …) float32, and these codes; None if none are better.

        Args:
            target: the weight, whose inputs are known.
            importance: of its shape, or None.

        Returns:
            Numbers and codes; and a few words for the log.

        Raises:
            UserError: the weight holds NaN or infinity.
        """
        rule, layer = target.rule, self._layer(target.weight, importance)
        affine = fit_affine(target.weight.name, layer.weight, bits_of(rule.scheme) or 8, rule.range)
        if not layer.correlated:
            return None, NO_CORRELATIONS
        free = rule.range in LEARNED_RANGES
        codes, grid = refined_affine(layer.weight, layer.single, layer.factor, affine, rows=layer.rows, free=free)
        numbers = grid.decode(codes)
        before = layer.loss(affine.decode(affine.codes(layer.weight)) - layer.weight)
        after = layer.loss(numbers - layer.weight)
        if not after < before:
            return None, NO_GAIN
        return (numbers.view(target.weight.shape), grid), _gain(after, before)

    def _layer(self, weight: Weight, importance: Tensor | None) -> Layer:
        """A weight (O, I) with its metric, of mean 1 on the diagonal, and with the importance of its rows."""
        stored: Tensor = weight.stored  # type: ignore[assignment]
        dense = stored.detach().float().flatten(1)
        second = self.inputs[weight.tensor_name].to(dense.device).double()
        counts = None if importance is None else importance.to(dense).flatten(1)
        own, kept = second.diagonal(), 1 - self.damping
        if any(isinstance(place.module, nn.Embedding | nn.EmbeddingBag) for place in weight.places):
            kept = min(kept, LOOKED_UP)
            own = own if counts is None else counts.mean(0).double()
        varies = second.diagonal() > _LEAST**2 * second.diagonal().mean()  # else its correlations are noise
        scale = own.clamp(min=_LEAST * own.mean()).sqrt() * second.diagonal().clamp(min=1e-30).rsqrt() * varies
        metric = kept * second * scale * scale[:, None]
        metric.diagonal().copy_(own.clamp(min=_LEAST * own.mean()))
        rows = torch.ones(len(dense), device=dense.device) if counts is None else counts.mean(1)
        return Layer(dense.contiguous(), metric / own.mean(), rows.clamp(min=_LEAST * rows.mean()))


def _gain(after: float, before: float) -> str:
    return f"error feedback, output error x{(after / before) ** 0.5:.3f}"


def _loss(layer: Layer, codes: Tensor, centroids: Tensor) -> float:
    return layer.loss(centroids.to(layer.weight)[codes.long()].view_as(layer.weight) - layer.weight)
