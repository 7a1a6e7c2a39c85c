"""Maps from layers in use to stored layers, and lists of layers to keep.

sharing    chunks of N adjacent layers have one set of weights (arXiv 2004.07320, section 7.2): with N = 2 the map
           of four layers is [0, 0, 2, 2]. The first layer of a chunk stores it.
pruning    a network trained with LayerDrop goes on without some of its layers (arXiv 1909.11556); with sharing,
           whole chunks go.
"""

import re
from collections.abc import Sequence

from ..errors import UserError

EVERY_OTHER = "every-other"
START = ("first", "mean")  # what a chunk's weights are made of, when layers that differ come to be shared
#: `every-other`, or the numbers of layers, from 0.
Keep = str | tuple[int, ...]
#: Stacks of a few layers each, in a network for images; the last chunk of such a stack may be shorter.
_STAGE = re.compile(r"(blocks)\.(\d+)\.layers")


def side_of(stack: str) -> str:
    """What the options about a stack begin with: encoder, decoder, or blocks_0 and so on for an EfficientNet's."""
    stage = _STAGE.fullmatch(stack)
    return f"{stage[1]}_{stage[2]}" if stage else stack.partition(".")[0]


def chunk_map(name: str, n_layers: int, chunk: int) -> list[int]:
    """For each layer in use the layer that stores its weights.

    Args:
        name: of the stack, for the message.
        n_layers: in use.
        chunk: N, adjacent layers that share their weights.

    Raises:
        UserError: `chunk` is not a number from 1 up that divides `n_layers` (of a stage of blocks, any from 1 up).
    """
    if type(chunk) is not int or chunk < 1 or (n_layers % chunk and not _STAGE.fullmatch(name)):
        fits = ", ".join(str(n) for n in range(1, n_layers + 1) if n_layers % n == 0)
        raise UserError(
            f"{name}: chunks of {chunk} layers do not divide its {n_layers} layers; give a share_layers of {fits}"
        )
    return [i - i % chunk for i in range(n_layers)]


def parse_keep(where: str, keep: object) -> Keep:
    """`every-other`, '0,2,4' or a list of numbers, as a Keep.

    Args:
        where: the option or key, for the message.
        keep: the value that was given.

    Raises:
        UserError: nothing to keep, a layer named twice, or something else than numbers from 0 up.
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
    """The layers that stay, in their order.

    Args:
        where: the option or key, for the message.
        keep: which ones; `every-other` is every other chunk, from the first one on.
        name: of the stack.
        n_layers: in use.
        chunk: adjacent layers that share their weights and stay or go together.

    Raises:
        UserError: a layer that the stack has not, or a part of a chunk.
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
