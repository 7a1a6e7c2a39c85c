"""Find what weights are encoded as: codes and centroids by k-means, and what error feedback makes of them."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..pq.encode import encode_together
from ..scalar import Affine
from ..utils import ranks
from ..weights.discovery import some_of
from .feedback import Feedback, feeds_back
from .targets import Target


class Found(NamedTuple):
    """What a weight of product quantization is encoded as."""

    codes: Tensor  # (rows, blocks a row)
    centroids: Tensor  # (K, d)
    fed_back: bool  # by error feedback

    def cpu(self) -> "Found":
        """The same, to send to other ranks."""
        return Found(self.codes.cpu(), self.centroids.cpu(), self.fed_back)


class Rounded(NamedTuple):
    """What a weight of intN begins at, by error feedback."""

    numbers: Tensor  # (rows, …) float32, which lie on the codes
    affine: Affine

    def cpu(self) -> "Rounded":
        """The same, to send to other ranks."""
        return Rounded(self.numbers.cpu(), self.affine.to(torch.device("cpu")))


def encode_targets(
    targets: Sequence[Target],
    importance: Mapping[str, Tensor],
    seed: int,
    where: str,
    progress: Callable[[str], None],
    feedback: Feedback | None = None,
) -> list[Found | Rounded | None]:
    """What each weight is encoded as: None, where its format finds that by itself. Each rank encodes its share.

    Raises:
        UserError: encoding failed on some rank; all ranks raise it, or the others would wait for ever.
    """
    rank, world = ranks.rank_and_world()
    groups = _by_codebook(targets)
    by_all = [_takes_no_time([targets[i] for i in of], feedback) for of in groups]
    owners = ranks.divide([0 if b else _numbers(targets, of) for b, of in zip(by_all, groups, strict=True)], world)
    mine = [of for b, of, owner in zip(by_all, groups, owners, strict=True) if b or owner == rank]
    found: dict[int, Found | Rounded | UserError] = {}
    left, began = sum(_numbers(targets, of) for of in mine), time.perf_counter()
    all_numbers = left
    for of in mine:
        try:
            pairs, how = _encode([targets[i] for i in of], importance, seed, feedback)
        except UserError as error:
            found[of[0]] = error
            break
        left -= _numbers(targets, of)
        seconds = (time.perf_counter() - began) * left / max(all_numbers - left, 1)
        for i, pair, line in zip(of, pairs, how, strict=True):
            if pair is not None:
                found[i] = pair if world == 1 else pair.cpu()
            progress(
                f"{where}[{i + 1}/{len(targets)}] {targets[i].weight.name} {tuple(targets[i].weight.shape)} {line}"
                + (f", {seconds:.0f} s left" if left else "")
            )
    together = {i: pair for part in ranks.gather(found) for i, pair in part.items()}
    for _, pair in sorted(together.items()):
        if isinstance(pair, UserError):
            raise pair
    return [together.get(i) for i in range(len(targets))]


def _takes_no_time(targets: Sequence[Target], feedback: Feedback | None) -> bool:
    """Whether every rank encodes these weights, for which there is nothing to search."""
    return not targets[0].rule.format.has_codebook and (feedback is None or not feedback.reaches(targets))


def _numbers(targets: Sequence[Target], of: Sequence[int]) -> int:
    return sum(math.prod(targets[i].weight.shape) for i in of)


def _by_codebook(targets: Sequence[Target]) -> list[list[int]]:
    """Group the targets' indices by codebook: those that share one together, every other one by itself."""
    groups: dict[tuple[str, int], list[int]] = {}
    for i, target in enumerate(targets):
        key = ("own", i) if target.codebook is None else ("shared", target.codebook)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _encode(
    targets: Sequence[Target], importance: Mapping[str, Tensor], seed: int, feedback: Feedback | None
) -> tuple[Sequence[Found | Rounded | None], list[str]]:
    """What the weights of one codebook, or one without, are encoded as, and a log line for each."""
    d, k = targets[0].block_size, targets[0].n_centroids
    names, given = [t.weight.name for t in targets], [importance.get(t.weight.tensor_name) for t in targets]
    counts = [None if g is None else t.weight.turn(g) for t, g in zip(targets, given, strict=True)]
    if d is None or k is None:
        return _encode_integers(targets[0], counts[0], feedback)
    stored: list[Tensor] = [t.weight.stored for t in targets]  # type: ignore[misc]
    found = encode_together(names, stored, d, k, seed=seed, importance=counts)
    how = "" if None in counts else "weighted, "
    how += "" if len(targets) == 1 else f"a codebook of {len(targets)} weights, "
    pairs, gain = [(one.codes, one.centroids) for one in found], ""
    if feedback is not None and feedback.reaches(targets):
        pairs, gain = feedback.refined(targets, found, counts)
        gain = f", {gain}"
    fed_back = pairs[0][1] is not found[0].centroids  # else it won nothing, and these are those of k-means
    said = [f"{how}d {d} K {k} relative error {one.relative_error:.4f}{gain}" for one in found]
    return [Found(*pair, fed_back) for pair in pairs], said


def _encode_integers(
    target: Target, counts: Tensor | None, feedback: Feedback | None
) -> tuple[list[Rounded | None], list[str]]:
    """What a weight of intN begins at, and a log line; raises UserError for one that is not finite."""
    rule = target.rule
    said = f"{rule.scheme} range {rule.range} relative error {_error(target):.4f}"
    if feedback is None or not feedback.reaches([target]):
        return [None], [said]
    found, gain = feedback.rounded(target, counts)
    return [None if found is None else Rounded(*found)], [f"{said}, {gain}"]


def warn_of_plain(targets: Sequence[Target], feedback: Feedback | None, progress: Callable[[str], None]) -> None:
    """A line for each reason why weights' errors are not fed back. Raises UserError where there are no others."""
    if feedback is None:
        return
    groups = [[targets[i] for i in of] for of in _by_codebook(targets)]
    left = [target for group in groups if not feedback.reaches(group) for target in group]
    searched = [target.weight.name for target in left if not feeds_back(target)]
    unmeasured = [target.weight.name for target in left if feeds_back(target)]
    if len(left) == len(targets):
        raise UserError(
            "encode: feedback: no calibration input reached a product with a weight of the plan; give batches that use "
            "the model, or leave it out"
            if unmeasured
            else "encode: feedback: a histogram's range is searched for again; give range: channel, or leave it out"
        )
    if searched:
        progress(f"note: without error feedback, since a histogram's range is searched for again: {some_of(searched)}")
    if unmeasured:
        progress(f"note: without error feedback, since no product's inputs were measured: {some_of(unmeasured)}")


def seen_by_itself(target: Target, dense: Tensor) -> Tensor:
    """What evaluation sees of a target without a codebook; raises UserError for a weight that is not finite."""
    return target.rule.format.seen(target.weight.name, dense, target.rule.scheme, target.rule.range)


def _error(target: Target) -> float:
    """||W - W_hat|| / ||W|| of a target without a codebook; raises UserError as `seen_by_itself`."""
    dense: Tensor = target.weight.stored.detach().float()  # type: ignore[operator]
    error = torch.linalg.vector_norm(seen_by_itself(target, dense) - dense)
    return float(error / torch.linalg.vector_norm(dense).clamp(min=1e-30))
