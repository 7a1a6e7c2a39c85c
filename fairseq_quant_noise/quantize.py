"""Weights of a model to codes and centroids, in place: all of a plan at once, or the weights of one stage."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import ranks
from .errors import UserError
from .layers import calibrating, quantize_inputs_, quantize_weight_, quantized_weights, to_int_
from .plan import Activations, Plan
from .pq.encode import encode
from .scalar import fake_quantize, fit_affine
from .structure.modules import apply_structure
from .table import Target, resolve_stages
from .watched import watched

logger = logging.getLogger(__name__)


def quantize_(
    model: nn.Module,
    plan: Plan | Mapping[str, Any] | str | Path,
    *,
    seed: int = 0,
    calibration: Iterable[Any] | Callable[[nn.Module], object] | None = None,
    progress: Callable[[str], None] = logger.info,
) -> nn.Module:
    """Quantize the weights of any module in place, all stages of the plan at once, without fine-tuning.

    Args:
        model: any nn.Module; its Linear, Embedding and Conv2d weights are what a plan can name.
        plan: a path, a mapping or a Plan. Its `structure` comes first: layers are shared, then pruned.
        seed: of k-means; the same model, plan and seed give the same codes.
        calibration: where the plan has `activations`, the inputs of a few forwards: of each a tensor, a tuple of
            arguments or a dict of them; or a function that runs the model on inputs of its own.
        progress: called with a line for each weight.
    Returns:
        The same model.
    Raises:
        UserError: the plan does not fit the model, which is then unchanged (but for its `structure`); or the
            calibration inputs do not reach all of it, which is quantized by then.
    """
    plan = Plan.of(plan)
    if not plan.stages:
        raise UserError("the plan has no stages; add a 'stages' section that says what to quantize")
    if plan.activations is not None and calibration is None:
        raise UserError("the plan quantizes activations, whose ranges need data; give calibration inputs")
    if plan.structure is not None:
        apply_structure(model, plan.structure)
    targets = sorted(resolve_stages(plan, model), key=lambda t: t.stage)
    quantize_targets(targets, seed=seed, progress=progress)
    ranks.check_same(quantized_state(model), "after the encoding")
    if plan.activations is not None:
        quantize_inputs(model, plan.activations, targets)
        with calibrating(model):
            _run(model, calibration, plan.activations.calibration_batches, progress)
    return model


def quantize_inputs(model: nn.Module, activations: Activations, targets: Iterable[Target]) -> None:
    """Give the modules that multiply by the targets' weights input quantizers, not calibrated yet."""
    names = [t.weight.name for t in targets]
    quantize_inputs_(model, names, activations.bits, activations.range, activations.calibration_batches)


def _run(model: nn.Module, calibration: Any, batches: int, progress: Callable[[str], None]) -> None:
    if callable(calibration):
        calibration(model)
        return
    for batch in watched(islice(calibration, batches), batches, "calibrating activations", progress):
        if isinstance(batch, Mapping):
            model(**batch)
        else:
            model(*(batch if isinstance(batch, tuple) else (batch,)))


def quantize_targets(
    targets: Sequence[Target], *, seed: int, where: str = "", progress: Callable[[str], None] = logger.info
) -> None:
    """Codes for each target, in the model, the same bits on every rank.

    k-means of the weights with scheme pq; in a distributed run each rank encodes its share of them and sends the result
    to the others. Weights with scheme intN are seen through their codes from now on, and stay trainable.

    Raises:
        UserError: a weight is quantized already, not finite, or not the same on every rank; on all ranks alike.
    """
    dense: dict[str, Tensor] = {}
    for target in targets:
        if isinstance(target.weight.stored, nn.Module):
            raise UserError(f"{target.weight.name} is quantized already; start from a dense model")
        dense[target.weight.name] = target.weight.stored
    ranks.check_same(dense, f"before {where or 'the encoding'}".strip())
    found = _encode_together(targets, seed, where, progress)
    for target, pair in zip(targets, found, strict=True):
        if pair is not None:
            quantize_weight_(target.weight, *pair, target.centroid_bits)
        else:
            to_int_(target.weight, target.rule.bits or 0, target.rule.range)


def quantized_state(model: nn.Module) -> dict[str, Tensor]:
    """Codes, centroids, scales, ... of all quantized weights, by name."""
    found = quantized_weights(model).items()
    return {f"{name}.{part}": tensor for name, weight in found for part, tensor in weight.state_dict().items()}


def _encode_together(
    targets: Sequence[Target], seed: int, where: str, progress: Callable[[str], None]
) -> list[tuple[Tensor, Tensor] | None]:
    """Codes and centroids of each weight with scheme pq, None for the others; each rank encodes its share.

    Raises:
        UserError: of any rank, in all of them: else the others would wait for ever.
    """
    rank, world = ranks.rank_and_world()
    owners = ranks.divide([0 if t.rule.bits else math.prod(t.weight.shape) for t in targets], world)
    mine = {i: t for i, t in enumerate(targets) if t.rule.bits is not None or owners[i] == rank}
    found: dict[int, tuple[Tensor, Tensor] | UserError] = {}
    left, began = sum(math.prod(t.weight.shape) for t in mine.values()), time.perf_counter()
    all_numbers = left
    for i, target in mine.items():
        try:
            pair, how = _encode(target, seed)
        except UserError as error:
            found[i] = error
            break
        if pair is not None:
            found[i] = pair if world == 1 else (pair[0].cpu(), pair[1].cpu())
        left -= math.prod(target.weight.shape)
        seconds = (time.perf_counter() - began) * left / max(all_numbers - left, 1)
        progress(
            f"{where}[{i + 1}/{len(targets)}] {target.weight.name} {tuple(target.weight.shape)} {how}"
            + (f", {seconds:.0f} s left" if left else "")
        )
    together = {i: pair for part in ranks.gather(found) for i, pair in part.items()}
    for _, pair in sorted(together.items()):
        if isinstance(pair, UserError):
            raise pair
    return [together.get(i) for i in range(len(targets))]


def _encode(target: Target, seed: int) -> tuple[tuple[Tensor, Tensor] | None, str]:
    """A weight's codes and centroids, None with scheme intN; and a line about them."""
    weight, d, k = target.weight, target.block_size, target.n_centroids
    if d is None or k is None:
        return None, f"{target.rule.scheme} range {target.rule.range} relative error {_int_error(target):.4f}"
    found = encode(weight.name, weight.stored, d, k, seed=seed)  # type: ignore[arg-type]
    return (found.codes, found.centroids), f"d {d} K {k} relative error {found.relative_error:.4f}"


def _int_error(target: Target) -> float:
    """||W - W_hat|| / ||W|| of the codes; raises UserError for a weight that is not finite."""
    dense: Tensor = target.weight.stored.detach().float()  # type: ignore[operator]
    seen = fake_quantize(dense, fit_affine(target.weight.name, dense, target.rule.bits or 0, target.rule.range))
    return float(torch.linalg.vector_norm(seen - dense) / torch.linalg.vector_norm(dense).clamp(min=1e-30))
