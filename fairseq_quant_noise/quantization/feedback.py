"""Measure the inputs of a model's layers, and encode their weights with error feedback (`pq/feedback.py`).

The metric M of a layer has the second moments of its inputs, H = E[x x^T], with the correlations damped:

    M_ii = H_ii,    M_ij = (1 - damping) H_ij

Rows count by the mean importance of their numbers, where there is any. A weight that an embedding looks up and a
product multiplies by (the output projection of a language model) costs in both uses. In the first, the errors of a
row's numbers do not depend on one another as far as is known. So half of the correlations is left, and M_ii is the mean
importance of column i, where there is any.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..layers.inputs import FAST_PATH_OFF, is_product
from ..pq.encode import Encoded
from ..pq.feedback import Layer, refined
from ..pq.row_scales import fitted_scales
from ..utils.modes import evaluating
from ..weights.discovery import Weight, find_weights
from .targets import Target

LOOKED_UP = 0.5  # share of the correlations that is left to a weight that is looked up, too
_LEAST = 1e-4  # M_ii and g_r, at least, as a share of their means


@contextmanager
def measuring_inputs(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Measure, over the forwards inside, what the weights `names` are multiplied by; the model is in eval mode.

    Args:
        model: dense.
        names: what a plan calls the weights. Those that no module multiplies an input of its own by (an embedding's, a
            convolution's, the projections inside `nn.MultiheadAttention`) are left out, as those that no input reaches.

    Yields:
        By the tensor's name E[x x^T], (I, I) float32; complete after the context.
    """
    wanted = set(names)
    found: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    handles = []
    for weight in find_weights(model):
        for module in _products(weight) if weight.name in wanted else ():
            hook = partial(_add, found, counts, weight.tensor_name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    # An attention may have a way past its projections, which a forward takes that needs none of them.
    fast = {module: module.__dict__[FAST_PATH_OFF] for module in model.modules() if FAST_PATH_OFF in module.__dict__}
    for module in fast:
        module.__dict__[FAST_PATH_OFF] = True
    try:
        with evaluating(model):
            yield found
    finally:
        for handle in handles:
            handle.remove()
        for module, off in fast.items():
            module.__dict__[FAST_PATH_OFF] = off
    for name, count in counts.items():
        found[name] /= count


def _products(weight: Weight) -> list[nn.Module]:
    """The modules that multiply their inputs (..., I) by the weight (O, I)."""
    flat = isinstance(weight.stored, Tensor) and weight.stored.dim() == 2
    places = [place for place in weight.places if flat and is_product(place)]
    return [place.module for place in places if not getattr(place.module, "transpose", False)]


def _add(
    found: dict[str, Tensor],
    counts: dict[str, int],
    name: str,
    module: nn.Module,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> None:
    """Add the squares of a module's first argument (..., I)."""
    given = next(iter([*args, *kwargs.values()]), None)
    if isinstance(given, Tensor) and given.is_floating_point():
        x = given.detach().float().flatten(0, -2)  # (n, I)
        if bool(x.isfinite().all()):
            found[name] = found[name].addmm_(x.t(), x) if name in found else x.t() @ x
            counts[name] = counts.get(name, 0) + len(x)


@dataclass(frozen=True)
class Feedback:
    """What error feedback needs."""

    inputs: Mapping[str, Tensor]  # by the tensor's name, E[x x^T] of the inputs it is multiplied by: (I, I)
    damping: float  # share of the correlations that is left out

    def reaches(self, targets: Sequence[Target]) -> bool:
        """Whether the inputs of all of these weights are known."""
        return all(target.weight.tensor_name in self.inputs for target in targets)

    def refined(
        self, targets: Sequence[Target], found: Sequence[Encoded], importance: Sequence[Tensor | None]
    ) -> tuple[list[Encoded], str]:
        """Codes (O, I/d) and centroids (K, d) of weights of one codebook; those of k-means, if none are better.

        Rows with scales are encoded over them; then the scales of least output error for these codes follow.

        Args:
            targets: the weights, whose inputs are known.
            found: of each the codes and centroids of k-means.
            importance: of each a tensor (O, I), as its blocks lie, or None.

        Returns:
            For each weight what was found, with the relative error of k-means; and a few words for the log.
        """
        given = [None if None in importance else counts for counts in importance]
        each = zip(targets, given, found, strict=True)
        layers = [self._layer(target.weight, counts, one.scales) for target, counts, one in each]
        mean = torch.cat([layer.rows for layer in layers]).mean()
        layers = [Layer(layer.weight, layer.metric, layer.rows / mean) for layer in layers]
        if all(torch.equal(layer.metric, layer.metric.diagonal().diag()) for layer in layers):
            return [*found], "no correlations to feed errors back by"
        codes, centroids = refined(layers, found[0].centroids)
        before = sum(_loss(layer, one.codes, one.centroids) for layer, one in zip(layers, found, strict=True))
        after = sum(_loss(layer, part, centroids) for layer, part in zip(layers, codes, strict=True))
        if not after < before:
            return [*found], "no gain by error feedback"
        better = [
            replace(one, codes=part, centroids=centroids, scales=_refitted(layer, part, centroids, one.scales))
            for layer, part, one in zip(layers, codes, found, strict=True)
        ]
        return better, f"error feedback, output error x{(after / before) ** 0.5:.3f}"

    def _layer(self, weight: Weight, importance: Tensor | None, scales: Tensor | None) -> Layer:
        """A weight (O, I) over its scales (O,), its metric, of mean 1 on the diagonal, and what its rows count."""
        stored: Tensor = weight.stored  # type: ignore[assignment]
        dense = stored.detach().float()
        second = self.inputs[weight.tensor_name].to(dense.device).double()
        counts = None if importance is None else importance.to(dense)
        own, kept = second.diagonal(), 1 - self.damping
        if any(isinstance(place.module, nn.Embedding | nn.EmbeddingBag) for place in weight.places):
            kept = min(kept, LOOKED_UP)
            own = own if counts is None else counts.mean(0).double()
        scale = own.clamp(min=_LEAST * own.mean()).sqrt() * second.diagonal().clamp(min=1e-30).rsqrt()
        metric = kept * second * scale * scale[:, None]
        metric.diagonal().copy_(own.clamp(min=_LEAST * own.mean()))
        rows = torch.ones(len(dense), device=dense.device) if counts is None else counts.mean(1)
        rows = rows.clamp(min=_LEAST * rows.mean())
        if scales is not None:
            dense, rows = dense / scales[:, None], rows * scales.square()
        return Layer(dense.contiguous(), metric / own.mean(), rows)


def _loss(layer: Layer, codes: Tensor, centroids: Tensor) -> float:
    return layer.loss(_seen(layer, codes, centroids) - layer.weight)


def _seen(layer: Layer, codes: Tensor, centroids: Tensor) -> Tensor:
    return centroids.to(layer.weight)[codes.long()].view_as(layer.weight)


def _refitted(layer: Layer, codes: Tensor, centroids: Tensor, scales: Tensor | None) -> Tensor | None:
    """The scales (O,) of least output error, of a layer whose weight is over `scales`; None without."""
    if scales is None:
        return None
    seen = _seen(layer, codes, centroids)
    return fitted_scales(layer.weight * scales[:, None], seen, seen.double() @ layer.metric, scales)
