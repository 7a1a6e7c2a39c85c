"""The paper's plans, one scheme for all weights, as choices among priced options, to hold the best plans against."""

from collections.abc import Sequence

from .kinds import ATTENTION
from .options import DENSE, PQ, Option, Priced
from .text import Chosen

#: By name: the scheme, and d of attention and of the other weights. All have 256 centroids (arXiv 2004.07320);
#: the fourth is the paper's iPQ.
UNIFORM: dict[str, tuple[str, int, int]] = {
    "int8": ("int8", 0, 0),
    "int4": ("int4", 0, 0),
    "pq, d 4": (PQ, 4, 4),
    "pq, d 8, attention 4": (PQ, 4, 8),
    "pq, d 8": (PQ, 8, 8),
    "pq, d 16": (PQ, 16, 16),
}


def uniform_choices(priced: Sequence[Priced]) -> dict[str, list[Chosen]]:
    """The choice of each uniform plan, by its name.

    A weight that has no such option takes the nearest smaller block size, then fewer centroids, or stays dense.
    """
    return {
        name: [Chosen(one.weight, _option(one, scheme, attention, others)) for one in priced]
        for name, (scheme, attention, others) in UNIFORM.items()
    }


def _option(one: Priced, scheme: str, attention: int, others: int) -> Option:
    d = attention if Chosen(one.weight, one.options[0]).kind == ATTENTION else others
    fitting = [option for option in one.options if option.scheme == scheme and (option.block_size or 0) <= d]
    if not fitting:
        return next(option for option in one.options if option.scheme == DENSE)
    return max(fitting, key=lambda option: (option.block_size or 0, option.n_centroids or 0, option.centroid_bits))
