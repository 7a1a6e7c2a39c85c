"""Compute maps from layers in use to stored layers, and lists of layers to keep.

sharing    chunks of N adjacent layers have one set of weights (arXiv 2004.07320, section 7.2): with N = 2 the map
           of four layers is [0, 0, 2, 2]. The first layer of a chunk stores it.
pruning    a network trained with LayerDrop goes on without some of its layers (arXiv 1909.11556); with sharing,
           whole chunks go.
"""

import re
from collections.abc import Sequence

from ..errors import UserError

EVERY_OTHER = "every-other"
START = ("first", "mean")  # initial weights of a chunk whose layers differ: the first layer's, or their mean
#: `every-other`, or the numbers of layers, from 0.
Keep = str | tuple[int, ...]
#: Stacks of a few layers each, in a network for images; the last chunk of such a stack may be shorter.
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


def parse_keep(where: str, keep: object) -> Keep:
    """Parse `every-other`, '0,2,4' or a list of numbers as a Keep.

    Args:
        where: the option or key, for the message.
        keep: the value that was given.

    Raises:
        UserError: the list is empty, names a layer twice, or holds anything but integers from 0 up.
    """
    if keep == EVERY_OTHER:
        return EVERY_OTHER
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
