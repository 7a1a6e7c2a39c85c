"""Price the options of each weight of a network, those with a codebook for several weights of a kind included.

k-means finds a shared codebook on the blocks of all weights of the kind that it fits, which is what the choice of
weights that share it in the end can only gain from: the fewer, the closer it fits them. It is tried where codebooks of
their own would take MUCH beside the codes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from ...pq.encode import encode_together
from ...utils.progress import watched
from ...weights.discovery import Weight, find_weights
from .kinds import ORDER, kind_of
from .options import ITERATIONS, PQ, SAMPLE, Option, Priced, Sample, decoded, samples_of, shared_ways, ways


def unpriced(model: nn.Module) -> list[Priced]:
    """The options of each weight of `model` that a plan can name, with their bytes alone; nothing is encoded."""
    weights = find_weights(model)
    shared: list[list[Option]] = [[] for _ in weights]
    for d, k, users in _in_common(weights):
        for i in users:
            shared[i] += _shared_options(weights[i], d, k)
    return [Priced(weight, list(ways(weight.shape)), of) for weight, of in zip(weights, shared, strict=True)]


def price(
    model: nn.Module, importance: Mapping[str, Tensor], progress: Callable[[str], None] = lambda line: None
) -> list[Priced]:
    """The options of each weight of `model` that a plan can name; a tied weight is one.

    Args:
        model: dense, and left so. Of weights on the meta device, which nobody knows yet, all numbers are normal and
            count alike.
        importance: by the tensor's name, a tensor of its shape, such as (out, in) for a Linear; a number of a weight
            without an entry counts as those of the others on average, and all alike where there are no entries.
        progress: called with a line now and then.

    Raises:
        UserError: a weight is quantized already, is not finite, or has ties that cannot be kept.
    """
    count, samples, found = len(find_weights(model)), [], []
    alike: dict[tuple[int, ...], list[Option]] = {}
    for sample in watched(samples_of(model, importance), count, "encoding each weight in several ways", progress):
        shape, known = sample.weight.shape, not sample.weight.stored.is_meta
        options = alike.get(shape) or sample.priced(ways(shape))
        if not known:  # so that all of one shape have the same losses
            alike[shape] = options
        found.append(Priced(sample.weight, options))
        samples.append(sample)
    shared = _shared(samples, progress)
    return [replace(one, shared=shared[i]) for i, one in enumerate(found)]


def _shared(samples: Sequence[Sample], progress: Callable[[str], None]) -> list[list[Option]]:
    """For each weight its options with a codebook that other weights of its kind have in common with it."""
    found: list[list[Option]] = [[] for _ in samples]
    todo = _in_common([sample.weight for sample in samples])
    for d, k, users in watched(todo, len(todo), "encoding weights that share a codebook", progress):
        for i, options in zip(users, _together([samples[i] for i in users], d, k), strict=True):
            found[i] += options
    return found


def _in_common(weights: Sequence[Weight]) -> list[tuple[int, int, list[int]]]:
    """The d and K of each codebook that weights of a kind may share, and the places of those weights."""
    found = []
    for kind in ORDER:
        places = [i for i, weight in enumerate(weights) if kind_of(weight) == kind]
        for d, k, users in shared_ways([weights[i].shape for i in places]):
            found.append((d, k, [places[i] for i in users]))
    return found


def _shared_options(weight: Weight, d: int, k: int) -> list[Option]:
    """The options of a weight with a shared codebook of this d and K, in fp16 and in 8 bits."""
    return [Option(PQ, d, k, bits, shared=True).sized(weight.shape) for bits in (16, 8)]


def _together(samples: Sequence[Sample], d: int, k: int) -> list[list[Option]]:
    """For each weight its options with a codebook of this d and K that all have in common, with their losses."""
    step = -(-sum(sample.numbers.numel() for sample in samples) // SAMPLE)
    fewer = [sample.thinned(step) for sample in samples]
    importance = [sample.h if sample.weighted else None for sample in fewer]
    names, numbers = [sample.weight.name for sample in fewer], [sample.numbers for sample in fewer]
    encoded = encode_together(names, numbers, d, k, seed=0, importance=importance, iterations=ITERATIONS)
    return [
        [
            replace(option, loss=sample.loss(decoded(one, tuple(sample.numbers.shape), option.centroid_bits)))
            for option in _shared_options(sample.weight, d, k)
        ]
        for sample, one in zip(fewer, encoded, strict=True)
    ]
