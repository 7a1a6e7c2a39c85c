"""Weights of a model to codes and centroids, in place: all of a plan at once, or the weights of one stage."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UserError
from .layers import calibrating, quantize_inputs_, quantize_weight_, to_int_
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
    """
    for target in targets:
        if isinstance(target.weight.stored, nn.Module):
            raise UserError(f"{target.weight.name} is quantized already; start from a dense model")
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    found: dict[int, tuple[Tensor, Tensor]] = {}
    mine = [t for i, t in enumerate(targets) if t.rule.bits is not None or i % world == rank]
    left, began = sum(math.prod(t.weight.shape) for t in mine), time.perf_counter()
    all_numbers = left
    for i, target in enumerate(targets):
        weight, d, k = target.weight, target.block_size, target.n_centroids
        if d is None or k is None:
            how, error = f"{target.rule.scheme} range {target.rule.range}", _int_error(target)
        elif i % world == rank:
            encoded = encode(weight.name, weight.stored, d, k, seed=seed)  # type: ignore[arg-type]
            found[i] = (encoded.codes, encoded.centroids)
            how, error = f"d {d} K {k}", encoded.relative_error
        else:
            continue
        left -= math.prod(weight.shape)
        seconds = (time.perf_counter() - began) * left / max(all_numbers - left, 1)
        progress(
            f"{where}[{i + 1}/{len(targets)}] {weight.name} {tuple(weight.shape)} {how} relative error {error:.4f}"
            + (f", {seconds:.0f} s left" if left else "")
        )
    if world > 1:
        found = _share(found, world, rank)
    for i, target in enumerate(targets):
        if target.rule.bits is None:
            quantize_weight_(target.weight, *found[i], target.centroid_bits)
        else:
            to_int_(target.weight, target.rule.bits, target.rule.range)


def _int_error(target: Target) -> float:
    """||W - W_hat|| / ||W|| of the codes; raises UserError for a weight that is not finite."""
    dense: Tensor = target.weight.stored.detach().float()  # type: ignore[operator]
    seen = fake_quantize(dense, fit_affine(target.weight.name, dense, target.rule.bits or 0, target.rule.range))
    return float(torch.linalg.vector_norm(seen - dense) / torch.linalg.vector_norm(dense).clamp(min=1e-30))


def _share(found: dict[int, tuple[Tensor, Tensor]], world: int, rank: int) -> dict[int, tuple[Tensor, Tensor]]:
    everything: list[Any] = [None] * world
    mine = {i: (codes.cpu(), centroids.cpu()) for i, (codes, centroids) in found.items()}
    dist.all_gather_object(everything, mine)
    return {i: pair for part in everything for i, pair in part.items()}
