"""The range [low, high] that affine codes span: of the whole tensor, of each output channel, or found on a histogram.

    tensor      min and max of all numbers
    channel     min and max of each slice along the first dimension (a Linear's or Conv2d's output, an Embedding's word)
    histogram   of the whole tensor, clipped where the squared error of the codes, read off a histogram, is least
    learned, learned-channel     where training starts that learns the scale (`layers/latent.py`): by a histogram; of
                each channel, clipped towards 0 where the squared error of its codes is least

`low` and `high` are (1,), or (C,) with one number for each channel.
"""

import torch
from torch import Tensor

from ..errors import UserError
from .affine import Affine

RANGES = ("tensor", "channel", "histogram")
LEARNED_RANGES = ("learned", "learned-channel")  # of a stage's weights only
STAGE_RANGES = (*RANGES, *LEARNED_RANGES)
INPUT_RANGES = ("tensor", "histogram")  # kinds that activations may have
BINS = 2048
_SHRINK = 64  # clips tried for each end
_CHANNEL_SHRINK = 32  # and for both ends of a channel together
_ROUNDS = 2  # over both ends


def fit_affine(name: str, weight: Tensor, bits: int, range_: str, *, check: bool = True) -> Affine:
    """The affine codes of `bits` bits for `weight`, by a range of the kind `range_`.

    Args:
        name: the weight's name, for messages.
        weight: (C, …), with channels along the first dimension.
        bits: N of intN.
        range_: one of STAGE_RANGES.
        check: whether to check that the weight is finite, for which a GPU must wait.

    Returns:
        Scales and zero points: (C,) for a range by channel, else (1,).

    Raises:
        UserError: the weight holds NaN or infinity, and `check` is true.
    """
    weight = weight.detach()
    if by_channel(range_):
        low, high = weight.reshape(weight.shape[0], -1).aminmax(dim=1)
    else:
        low, high = (end.reshape(1) for end in weight.aminmax())
    if check and not bool((low.isfinite() & high.isfinite()).all()):
        raise UserError(f"{name}: the weight holds NaN or infinity; use a checkpoint from before it diverged")
    if range_ in ("histogram", "learned"):
        low, high = histogram_range(weight, bits)
    if range_ == "learned-channel":
        low, high = _clipped(weight.float().reshape(weight.shape[0], -1), low.float(), high.float(), bits)
    return Affine.of_range(low, high, bits)


def by_channel(range_: str) -> bool:
    """Whether each channel has a range of its own."""
    return range_.endswith("channel")


def _clipped(rows: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """For each row of (C, n) the range, (C,) and (C,), of least squared error between its extremes and 0."""
    least = torch.full_like(low, torch.inf)
    best = low, high
    for fraction in torch.linspace(1, 1 / _CHANNEL_SHRINK, _CHANNEL_SHRINK).tolist():
        affine = Affine.of_range(low * fraction, high * fraction, bits)
        error = (affine.decode_(affine.rounded(rows)) - rows).square_().sum(1)
        better = error < least
        ends = (low * fraction, high * fraction)
        best = torch.where(better, ends[0], best[0]), torch.where(better, ends[1], best[1])
        least = torch.minimum(error, least)
    return best


def histogram_range(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The clipped range (low, high), each (1,), of least squared error on a histogram of `values`, of any shape.

    First both ends move towards 0 together, over _SHRINK fractions of their distance from it; then each in turn moves
    from its extreme, while the other one stays.
    """
    values = values.detach().float().reshape(-1)
    least, most = values.aminmax()
    least, most = least.reshape(1).clamp(max=0), most.reshape(1).clamp(min=0)
    if not bool(most > least):
        return least, most
    counts = torch.histc(values, BINS, least.item(), most.item())  # (BINS,)
    centers = least + (most - least) * (torch.arange(BINS, device=values.device) + 0.5) / BINS  # (BINS,)
    fractions = torch.linspace(1, 1 / _SHRINK, _SHRINK, device=values.device)  # (F,)
    low, high = _best(least * fractions, most * fractions, centers, counts, bits)
    for _ in range(_ROUNDS):
        low = _best(least * fractions, high.expand(_SHRINK), centers, counts, bits)[0]
        high = _best(low.expand(_SHRINK), most * fractions, centers, counts, bits)[1]
    return low, high


def _best(lows: Tensor, highs: Tensor, centers: Tensor, counts: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The range, (1,) and (1,), of the candidates (F,) that has the least squared error over the histogram."""
    affine = Affine.of_range(lows, highs, bits)
    points = centers.expand(len(lows), -1)  # (F, BINS): a channel for each range
    error = (affine.decode(affine.codes(points)) - points).square_() @ counts  # (F,)
    best = error.argmin()
    return lows[best].reshape(1), highs[best].reshape(1)
