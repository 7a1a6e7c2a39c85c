"""Quantize the weights of a model in place: all stages of a plan at once, or the weights of one stage."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers import (
    LatentPQWeight,
    calibrating,
    join_,
    quantize_inputs_,
    quantize_weight_,
    quantized_weights,
    warn_of_unrounded,
)
from ..layers.batch_statistics import batch_norms, estimating
from ..layers.latent import LatentIntWeight
from ..layers.pq import PQWeight
from ..layers.quantized import QuantizedWeight, dense_weight
from ..plan.plan import Plan
from ..plan.rules import Activations, Codes
from ..utils import ranks
from ..utils.progress import watched
from ..weights.discovery import warn_of_uncovered
from .code_training import encode_in_training
from .encoding import Found, encode_targets, seen_by_itself, warn_of_plain
from .feedback import Feedback, feeds_back, measuring_inputs
from .importance import check_importance
from .structure import apply_structure
from .targets import Target, resolve_stages

logger = logging.getLogger(__name__)

#: The warning when no data is given to estimate batch statistics on.
STALE = (
    "batch normalisation keeps the statistics of the dense weights, by which a quantized network may fall to chance; "
    "give data to estimate them on: --calibration-data DATA, or calibration=BATCHES in Python"
)


def quantize_(
    model: nn.Module,
    plan: Plan | Mapping[str, Any] | str | Path,
    *,
    seed: int = 0,
    importance: Mapping[str, Tensor] | None = None,
    calibration: Iterable[Any] | Callable[[nn.Module], object] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    strict: bool = False,
    progress: Callable[[str], None] = logger.info,
) -> nn.Module:
    """Quantize the weights of any module in place, all stages of the plan at once, without fine-tuning.

    Train the model afterwards as always, with an optimizer over its new `parameters()`: centroids learn, and with
    `codes: train` in the plan the codes are found anew before every so many training forwards of the model.

    Args:
        model: any nn.Module; the weights that `weights/blocks.py` lists are what a plan can name.
        plan: a path, a mapping or a Plan. Its `structure` comes first: layers are shared, then pruned.
        seed: of k-means; the same model, plan, importance and seed give the same codes.
        importance: by a tensor's name, a tensor of its shape: how much the squared error of each number counts in
            k-means, as squared gradients (`second_moments(model, optimizer)` of its Adam) or squared inputs. Without
            an entry, and with `centroids: {weighted: false}` in the plan, all numbers count alike.
        calibration: inputs like those of evaluation, without labels, for what must be measured on data: for
            `encode: feedback` the inputs of the layers, over the first `batches`; the running statistics of batch
            normalisation, which are estimated anew over all of them, then the ranges of `activations`, over the first
            `calibration_batches`. A batch is a tensor, a tuple of arguments, a dict of them, or a function that runs
            the model on inputs of its own; such a function may also stand for all.
        inputs: by a tensor's name, the second moments E[x x^T], (I, I), of the inputs it is multiplied by, as
            `measuring_inputs` finds them; for `encode: feedback` in place of calibration inputs.
        strict: refuse a model with a matrix that no rule can name, or, with `activations`, with a weight whose inputs
            cannot be rounded; else a warning names them.
        progress: called with a line for each weight.

    Returns:
        The same model.

    Raises:
        UserError: the plan does not fit the model, which is then unchanged (but for its `structure`); or the
            calibration inputs do not reach all of it, which is quantized by then.
    """
    plan = Plan.of(plan)
    _check_plan(plan, calibration is not None, calibration is not None or inputs is not None)
    ranks.check_whole(model.named_parameters(), "quantize_")
    if plan.structure is not None:
        apply_structure(model, plan.structure)
    given = (importance or {}) if plan.centroids.weighted else {}
    targets = sorted(resolve_stages(plan, model), key=lambda t: t.stage)
    warn_of_uncovered(model, strict)  # before encoding, while all parameters are dense
    if plan.activations is not None:
        warn_of_unrounded(model, (t.weight.name for t in targets), strict)
    check_importance(given, {t.weight.tensor_name: t.weight.dense_shape for t in targets})
    batches = None if calibration is None else iter([calibration] if callable(calibration) else calibration)
    feedback = None
    if plan.encode.feeds_back:
        if inputs is None:
            first = list(islice(batches or (), plan.encode.batches))
            inputs, batches = _inputs(model, targets, first, progress), chain(first, batches or ())
        feedback = Feedback(inputs, plan.encode.damping)
    quantize_targets(targets, seed=seed, importance=given, codes=plan.codes, feedback=feedback, progress=progress)
    if plan.codes.train:
        encode_in_training(model, plan.codes)
    ranks.check_same(quantized_state(model), "after the encoding")
    if plan.activations is not None:
        quantize_inputs(model, plan.activations, targets)
    if batches is not None:
        _calibrate(model, batches, plan.activations, progress)
    elif batch_norms(model):
        logger.warning(STALE)
    return model


def _check_plan(plan: Plan, has_data: bool, has_inputs: bool) -> None:
    """That there is something to quantize, and data where it is needed. Raises UserError."""
    if not plan.stages:
        raise UserError("the plan has no stages; add a 'stages' section that says what to quantize")
    if plan.activations is not None and not has_data:
        raise UserError("the plan quantizes activations, whose ranges need data; give calibration inputs")
    if plan.encode.feeds_back and not has_inputs:
        raise UserError("the plan's encode: feedback needs data; give calibration inputs, or leave it out")


def quantize_inputs(model: nn.Module, activations: Activations, targets: Iterable[Target]) -> None:
    """Add input quantizers, not calibrated yet, to the modules that multiply by the targets' weights."""
    names = [t.weight.name for t in targets]
    quantize_inputs_(model, names, activations.bits, activations.range, activations.calibration_batches)


def _inputs(
    model: nn.Module, targets: Sequence[Target], batches: Sequence[Any], progress: Callable[[str], None]
) -> dict[str, Tensor]:
    with measuring_inputs(model, [t.weight.name for t in targets if feeds_back(t)]) as found:
        for batch in watched(batches, len(batches), "measuring the layers' inputs", progress):
            _forward(model, batch)
    return found


def _calibrate(
    model: nn.Module, batches: Iterator[Any], activations: Activations | None, progress: Callable[[str], None]
) -> None:
    """Batch statistics over all batches, then ranges over the first ones: a range depends on the statistics before it.

    An iterator is read once, and no further than is needed.
    """
    first = [] if activations is None else list(islice(batches, activations.calibration_batches))
    if batch_norms(model):
        with estimating(model):
            for batch in watched(chain(first, batches), None, "estimating batch statistics", progress):
                _forward(model, batch)
    if activations is not None:
        with calibrating(model):
            for batch in watched(first, len(first), "calibrating activations", progress):
                _forward(model, batch)


def _forward(model: nn.Module, batch: Any) -> None:
    if callable(batch):  # and no tensor is
        batch(model)
    elif isinstance(batch, Mapping):
        model(**batch)
    else:
        model(*(batch if isinstance(batch, tuple) else (batch,)))


def quantize_targets(
    targets: Sequence[Target],
    *,
    seed: int,
    importance: Mapping[str, Tensor] | None = None,
    codes: Codes | None = None,
    feedback: Feedback | None = None,
    where: str = "",
    progress: Callable[[str], None] = logger.info,
) -> None:
    """Replace each target's weight in the model by a quantized one, the same bits on every rank.

    Weights whose format has a codebook (pq) go through k-means; in a distributed run each rank encodes its share of
    them and sends the result to the others. The other formats quantize their weights themselves. `importance` is as in
    `quantize_`: by the tensor's name, of the weight's shape, such as (out, in). With `codes` that train, the dense
    weights go on as latent ones (`layers/pq_latent.py`). With `feedback`, a weight whose inputs it knows is encoded by
    the error of its outputs; its latent weight begins at its centroids, or the first encoding would undo that.

    Raises:
        UserError: a weight is quantized already, not finite, or not the same on every rank; on all ranks alike.
    """
    dense: dict[str, Tensor] = {}
    for target in targets:
        if isinstance(target.weight.stored, nn.Module):
            raise UserError(f"{target.weight.name} is quantized already; start from a dense model")
        dense[target.weight.name] = target.weight.stored
    ranks.check_same(dense, f"before {where or 'the encoding'}".strip())
    warn_of_plain(targets, feedback, progress)
    found = encode_targets(targets, importance or {}, seed, where, progress, feedback)
    quantized: list[QuantizedWeight] = []
    for target, pair in zip(targets, found, strict=True):
        if not isinstance(pair, Found):
            made = target.rule.format.quantize_(target.weight, target.rule.scheme, target.rule.range)
            if pair is not None:
                assert isinstance(made, LatentIntWeight)
                made.begin_at(*pair)
            quantized.append(made)
            continue
        given = target.weight, pair.codes, pair.centroids, target.centroid_bits, target.codebook
        if codes is None or not codes.train:
            quantized.append(quantize_weight_(*given))
            continue
        latent = dense_weight(target.weight)  # before codes take its place
        trained = quantize_weight_(*given, LatentPQWeight)
        trained.set_latent(trained.at_centroids() if pair.fed_back else latent, codes.learning_rate, codes.share)
        quantized.append(trained)
    join_(quantized)


@torch.no_grad()
def quantized_values(
    targets: Sequence[Target],
    *,
    seed: int,
    importance: Mapping[str, Tensor] | None = None,
    progress: Callable[[str], None] = logger.info,
) -> list[tuple[nn.Parameter, Tensor]]:
    """Each target's weight with the value that evaluation would see after `quantize_targets`; the model stays dense.

    Args:
        targets: weights that are dense.
        seed: of k-means.
        importance: as in `quantize_`: by the tensor's name, of the weight's shape, such as (out, in).
        progress: called with each line of progress.

    Returns:
        For each target, (the Parameter, the decoded tensor of the same shape and device).

    Raises:
        UserError: a weight is not finite.
    """
    found = encode_targets(targets, importance or {}, seed, "", progress)
    values = []
    for target, pair in zip(targets, found, strict=True):
        stored, parameter = dense_weight(target.weight), target.weight.parameter
        assert isinstance(parameter, nn.Parameter)
        if not isinstance(pair, Found):
            seen = seen_by_itself(target, stored)
        else:
            parts = pair.codes.to(stored.device), pair.centroids.to(stored)
            seen = PQWeight(*parts, tuple(stored.shape), target.centroid_bits).eval().decode()
        values.append((parameter, target.weight.turn(seen)))
    return values


@contextmanager
def swapped(values: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Give the parameters other values inside the context, and their own back after it.

    Args:
        values: pairs of (Parameter, tensor of the same shape).
    """
    kept = [parameter.data for parameter, _ in values]
    try:
        for parameter, value in values:
            parameter.data = value
        yield
    finally:
        for (parameter, _), before in zip(values, kept, strict=True):
            parameter.data = before


def quantized_state(model: nn.Module) -> dict[str, Tensor]:
    """Codes, centroids, scales, ... of all quantized weights, by name.

    The shapes are those of `Packed.state_dict`, such as NAME.codes (rows, blocks per row) and NAME.centroids (K, d).
    """
    found = quantized_weights(model).items()
    return {f"{name}.{part}": tensor for name, weight in found for part, tensor in weight.state_dict().items()}
