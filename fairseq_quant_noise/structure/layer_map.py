"""Compute maps from layers in use to stored layers, and lists of layers to keep.

sharing    chunks of N adjacent layers have one set of weights (arXiv 2004.07320, section 7.2): with N = 2 the map
           of four layers is [0, 0, 2, 2]. The first layer of a chunk stores it.
pruning    a network trained with LayerDrop goes on without some of its layers (arXiv 1909.11556): every other one,
           all but a list, or those with the lowest keep rates (`learned_rates.py`); with sharing, whole chunks go.
"""

import re
from collections.abc import Sequence

from ..errors import UserError

EVERY_OTHER = "every-other"
LEARNED = "learned"
START = ("first", "mean")  # initial weights of a chunk whose layers differ: the first layer's, or their mean
#: `every-other`, `learned`, `learned:N` for N layers, or the numbers of layers, from 0.
Keep = str | tuple[int, ...]
#: Stacks of a few layers each, in a network for images; the last chunk of such a stack may be shorter.
_LEARNED = re.compile(rf"{LEARNED}(?::(\d+))?")
_STAGE = re.compile(r"(blocks)\.(\d+)\.layers")


def side_of(stack: str) -> str:
    """The prefix of a stack's options: encoder, decoder, or (the stages of an EfficientNet) blocks_0, blocks_1 etc."""
    stage = _STAGE.fullmatch(stack)
    return f"{stage[1]}_{stage[2]}" if stage else stack.partition(".")[0]


def chunk_map(name: str, n_layers: int, chunk: int) -> list[int]:
    """Map each layer in use to the layer that stores its weights.

    Args:
        name: the stack's name, for the message.
        n_layers: number of layers in use.
        chunk: N, the number of adjacent layers that share their weights.

    Raises:
        UserError: `chunk` is not an integer from 1 up that divides `n_layers` (a stage of blocks need not be divided).
    """
    if type(chunk) is not int or chunk < 1 or (n_layers % chunk and not _STAGE.fullmatch(name)):
        fits = ", ".join(str(n) for n in range(1, n_layers + 1) if n_layers % n == 0)
        raise UserError(
            f"{name}: chunks of {chunk} layers do not divide its {n_layers} layers; give a share_layers of {fits}"
        )
    return [i - i % chunk for i in range(n_layers)]


def parse_keep(where: str, keep: object, learned: bool = False) -> Keep:
    """Parse `every-other`, '0,2,4' or a list of numbers as a Keep.

    Args:
        where: the option or key, for the message.
        keep: the value that was given.
        learned: whether it may be `learned` or `learned:N`.

    Raises:
        UserError: the list is empty, names a layer twice, or holds anything but integers from 0 up.
    """
    if keep == EVERY_OTHER:
        return EVERY_OTHER
    if learned and isinstance(keep, str) and _LEARNED.fullmatch(keep):
        return keep
    parts = [part.strip() for part in keep.split(",")] if isinstance(keep, str) else keep
    if not isinstance(parts, Sequence) or not all(_is_layer(part) for part in parts):
        given = keep if isinstance(keep, str) else repr(keep)
        raise UserError(f"{where} is {given}; give the numbers of the layers to keep, such as 0,2,4, or {EVERY_OTHER}")
    layers = tuple(int(part) for part in parts)
    if not layers:
        raise UserError(f"{where} is empty; name the layers to keep, such as 0,2,4, or give {EVERY_OTHER}")
    twice = next((n for n in layers if layers.count(n) > 1), None)
    if twice is not None:
        raise UserError(f"{where} names layer {twice} twice; name each layer once")
    return tuple(sorted(layers))


def _is_layer(part: object) -> bool:
    return part.isdecimal() if isinstance(part, str) else type(part) is int and part >= 0


def kept_layers(where: str, keep: Keep, name: str, n_layers: int, chunk: int = 1) -> list[int]:
    """The numbers of the layers that stay, in order.

    Args:
        where: the option or key, for the message.
        keep: which layers; `every-other` is every other chunk, from the first one on.
        name: the stack's name, for the message.
        n_layers: number of layers in use.
        chunk: number of adjacent layers that share their weights, and so stay or go together.

    Raises:
        UserError: `keep` names a layer that the stack does not have, or only part of a chunk.
    """
    if keep == EVERY_OTHER:
        return [i for i in range(n_layers) if i // chunk % 2 == 0]
    layers = [int(n) for n in keep]
    if layers[-1] >= n_layers:
        raise UserError(
            f"{where} names layer {layers[-1]}, and {name} has {n_layers} layers; give numbers from 0 to {n_layers - 1}"
        )
    for n in layers:
        chunk_of = range(n - n % chunk, min(n - n % chunk + chunk, n_layers))
        missing = [i for i in chunk_of if i not in layers]
        if missing:
            raise UserError(
                f"{where} keeps layer {n} of {name} and not layer {missing[0]}, which shares its weights; "
                f"keep all of {', '.join(map(str, chunk_of))}, or none"
            )
    return layers


def is_learned(keep: Keep) -> bool:
    """Whether the layers to keep are those with the highest learned rates."""
    return isinstance(keep, str) and _LEARNED.fullmatch(keep) is not None


def learned_layers(
    where: str, keep: Keep, name: str, n_layers: int, chunk: int, scores: Sequence[float] | None, p: float | None
) -> list[int]:
    """The numbers of the layers with the highest learned scores, in order.

    Args:
        where: the option or key, for the message.
        keep: `learned`, as many layers as stayed on average in training, or `learned:N`.
        name: the stack's name, for the message.
        n_layers: number of layers in use.
        chunk: number of adjacent layers that share their weights, and so stay or go together.
        scores: one for each chunk; None where nothing was learned.
        p: the mean of the probabilities of leaving a chunk out; None where it is not known.

    Raises:
        UserError: there are no scores for these layers, N is not from 1 to `n_layers` or no whole number of chunks, or
            neither N nor p is known.
    """
    chunks = -(-n_layers // chunk)
    if scores is None or len(scores) != chunks:
        raise UserError(
            f"{where} {keep}: no rates of {name} were learned; train with --learn-layerdrop (in Python "
            f"learn_layerdrop_), or give {EVERY_OTHER} or a list of layers"
        )
    given = _LEARNED.fullmatch(str(keep))
    number = given[1] if given else None
    if number is None and p is None:
        raise UserError(f"{where} {keep}: which p {name} was trained with is not known; give learned:N, for N layers")
    n = max(round(chunks * (1 - (p or 0))), 1) * chunk if number is None else int(number)
    if not 1 <= n <= n_layers or (n % chunk and n != n_layers):
        what = f"from 1 to {n_layers}" if chunk == 1 else f"a multiple of {chunk}, which share their weights"
        raise UserError(f"{where} {keep}: {name} has {n_layers} layers; give {what}")
    best = sorted(range(chunks), key=lambda i: -scores[i])[: -(-n // chunk)]
    return [i for i in range(n_layers) if i // chunk in best]
