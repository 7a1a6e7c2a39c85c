"""Weights of a model to codes and centroids, in place: all of a plan at once, or the weights of one stage."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from .errors import UserError
from .layers import quantize_weight_
from .plan import Plan
from .pq.encode import encode
from .table import Target, resolve_stages

logger = logging.getLogger(__name__)


def quantize_(
    model: nn.Module,
    plan: Plan | Mapping[str, Any] | str | Path,
    *,
    seed: int = 0,
    progress: Callable[[str], None] = logger.info,
) -> nn.Module:
    """Quantize the weights of any module in place, all stages of the plan at once, without fine-tuning.

    Args:
        model: any nn.Module; its Linear, Embedding and Conv2d weights are what a plan can name.
        plan: a path, a mapping or a Plan.
        seed: of k-means; the same model, plan and seed give the same codes.
        progress: called with a line for each weight.
    Returns:
        The same model.
    Raises:
        UserError: the plan does not fit the model; the model is then unchanged.
    """
    plan = Plan.of(plan)
    if not plan.stages:
        raise UserError("the plan has no stages; add a 'stages' section that says what to quantize")
    targets = resolve_stages(plan, model)
    quantize_targets(sorted(targets, key=lambda t: t.stage), seed=seed, progress=progress)
    return model


def quantize_targets(
    targets: Sequence[Target], *, seed: int, where: str = "", progress: Callable[[str], None] = logger.info
) -> None:
    """k-means for each target, then its codes and centroids in the model, the same bits on every rank.

    In a distributed run each rank encodes its share of the weights and sends the result to the others.
    """
    for target in targets:
        if isinstance(target.weight.stored, nn.Module):
            raise UserError(f"{target.weight.name} is quantized already; start from a dense model")
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for i, target in enumerate(targets):
        if i % world != rank:
            continue
        weight, d, k = target.weight, target.block_size, target.n_centroids
        encoded = encode(weight.name, weight.stored, d, k, seed=seed)  # type: ignore[arg-type]
        found[i] = (encoded.codes, encoded.centroids)
        progress(
            f"{where}[{i + 1}/{len(targets)}] {weight.name} {tuple(weight.shape)} d {d} K {k} "
            f"relative error {encoded.relative_error:.4f}"
        )
    if world > 1:
        found = _share(found, world, rank)
    for i, target in enumerate(targets):
        quantize_weight_(target.weight, *found[i])


def _share(found: dict[int, tuple[Tensor, Tensor]], world: int, rank: int) -> dict[int, tuple[Tensor, Tensor]]:
    everything: list[Any] = [None] * world
    mine = {i: (codes.cpu(), centroids.cpu()) for i, (codes, centroids) in found.items()}
    dist.all_gather_object(everything, mine)
    return {i: pair for part in everything for i, pair in part.items()}
