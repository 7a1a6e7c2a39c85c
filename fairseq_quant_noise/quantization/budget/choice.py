"""Choose among the options of all weights, and the codebooks that weights of a kind may share.

Of each kind (`kinds.py`) at most one codebook is shared, by those of its weights that gain most from it; its bytes are
spent once, and its other weights have options of their own.
"""

from collections.abc import Callable, Sequence

from ...weights.discovery import Weight
from .kinds import ORDER, kind_of
from .knapsack import Alternative, choose_among
from .options import Option, Priced, codebook_bytes
from .text import Chosen

_Codebook = tuple[int, int, int]
Beside = Callable[[Weight, Option], int]


def nothing(weight: Weight, option: Option) -> int:
    """No bytes beside an option's own."""
    return 0


def best_choice(priced: Sequence[Priced], budget: int, beside: Beside = nothing) -> list[Chosen]:
    """The options of least predicted loss within `budget` bytes, in the order of `priced`.

    Args:
        priced: all weights.
        budget: bytes for them; if even the smallest choice exceeds it, that is taken.
        beside: the bytes that a weight takes in a file beside those of its option.
    """
    kinds = [[one for one in priced if kind_of(one.weight) == kind] for kind in ORDER]
    offered = [[_offered(of, codebook, beside) for codebook in _codebooks(of)] for of in kinds]
    groups = [
        [
            Alternative(fixed, [[(size, option.loss) for size, option in options] for options in lists])
            for fixed, lists in alternatives
        ]
        for alternatives in offered
    ]
    taken: dict[int, Chosen] = {}
    for of, alternatives, (which, choice) in zip(kinds, offered, choose_among(groups, budget), strict=True):
        for one, options, i in zip(of, alternatives[which][1], choice, strict=True):
            taken[id(one)] = Chosen(one.weight, options[i][1])
    return [taken[id(one)] for one in priced]


def _codebooks(of: Sequence[Priced]) -> list[_Codebook | None]:
    """What the weights of a kind may share, none first."""
    return [None, *dict.fromkeys(option.codebook for one in of for option in one.shared)]


def _offered(
    of: Sequence[Priced], codebook: _Codebook | None, beside: Beside
) -> tuple[int, list[list[tuple[int, Option]]]]:
    """With a codebook for the weights of a kind: its bytes, and for each weight its options with their bytes.

    Options that take no fewer bytes than another and lose no less are left out.
    """
    lists = []
    for one in of:
        options = [*one.options, *(option for option in one.shared if option.codebook == codebook)]
        sized = [(option.bytes + beside(one.weight, option), option) for option in options]
        kept: list[tuple[int, Option]] = []
        for size, option in sorted(sized, key=lambda pair: (pair[0], pair[1].loss)):
            if not kept or option.loss < kept[-1][1].loss:
                kept.append((size, option))
        lists.append(kept)
    return codebook_bytes(codebook) if codebook else 0, lists
