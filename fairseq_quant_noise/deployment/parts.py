"""Say what of a network becomes a graph: what it computes, from which inputs, and which of their sizes are open.

A RoBERTa has a graph for the scores of words and one for each head. A model for translation has two, so that a program
encodes a sentence once and decodes it a word at a time.

Shapes: B batch, T tokens, S tokens of the source, M channels of the encoder, N images, H x W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import UserError
from ..networks import EfficientNet, Roberta, Transformer, TransformerLM
from ..networks.adaptive import AdaptiveInput
from ..networks.attention import key_mask

TOKENS = ("batch", "length")
SOURCE = ("batch", "source_length")


@dataclass(frozen=True)
class Input:
    """An input of a graph."""

    example: Tensor  # what the network is traced with
    sizes: tuple[str | None, ...]  # of each dimension the name, where it is open


@dataclass(frozen=True)
class Part:
    """What a graph computes of a network."""

    run: Callable[..., Tensor]  # from the inputs, in their order
    inputs: dict[str, Input]
    output: str
    sizes: tuple[str | None, ...]  # the output's


def part_of(network: torch.nn.Module, name: str | None) -> Part:
    """The part of a network that is called `name`.

    Args:
        network: one of this package's, its weights of any value.
        name: of a RoBERTa, one of its heads or None for the scores of words; of a model for translation, `encoder` or
            `decoder`; of the others, None.

    Raises:
        UserError: the network has no such part, or is none of this package's.
    """
    parts = _parts(network)
    if name not in parts:
        given = "no --part" if name is None else f"--part {name}"
        known = " or ".join("no --part" if part is None else f"--part {part}" for part in parts)
        raise UserError(f"{given} does not fit this network; give {known}")
    return parts[name]()


def _parts(network: torch.nn.Module) -> dict[str | None, Callable[[], Part]]:
    if isinstance(network, TransformerLM):
        return {None: partial(_language_model, network)}
    if isinstance(network, Roberta):
        return {head: partial(_roberta, network, head) for head in (None, *network.classification_heads)}
    if isinstance(network, Transformer):
        return {"encoder": partial(_encoder, network), "decoder": partial(_decoder, network)}
    if isinstance(network, EfficientNet):
        return {None: partial(_image_network, network)}
    raise UserError(f"a {type(network).__name__} cannot be exported to ONNX; give a file of one of fairseq's models")


def _language_model(network: TransformerLM) -> Part:
    embedding = network.decoder.embed_tokens
    firsts = [first for first, _ in embedding.bands] if isinstance(embedding, AdaptiveInput) else [0]
    tokens = Input(_words(network.config.padding_idx, firsts), TOKENS)
    return Part(network, {"tokens": tokens}, "scores", (*TOKENS, None))


def _roberta(network: Roberta, head: str | None) -> Part:
    tokens = Input(_words(network.config.padding_idx), TOKENS)
    sizes = (*TOKENS, None) if head is None else ("batch", None)
    return Part(lambda given: network(given, head), {"tokens": tokens}, "scores", sizes)


def _encoder(network: Transformer) -> Part:
    source = Input(_words(network.config.encoder.padding_idx), SOURCE)
    return Part(network.encoder, {"source": source}, "memory", (*SOURCE, None))


def _decoder(network: Transformer) -> Part:
    config = network.config
    source = _words(config.encoder.padding_idx)
    inputs = {
        "tokens": Input(_words(config.decoder.padding_idx), TOKENS),
        "memory": Input(torch.zeros(*source.shape, config.encoder.dim), (*SOURCE, None)),  # (B, S, M)
        "source": Input(source, SOURCE),
    }

    def run(tokens: Tensor, memory: Tensor, source: Tensor) -> Tensor:
        return network.decoder(tokens, memory, key_mask(source.eq(config.encoder.padding_idx)))

    return Part(run, inputs, "scores", (*TOKENS, None))


def _image_network(network: EfficientNet) -> Part:
    images = Input(torch.zeros(2, 3, 64, 64), ("batch", None, "height", "width"))
    return Part(network, {"images": images}, "scores", ("batch", None))


def _words(padding_idx: int, firsts: list[int] | None = None) -> Tensor:
    """Example tokens (B, 2) that lead through every branch of a network: padding is there, and each band's words."""
    word = 0 if padding_idx else 1
    return torch.tensor([[word, word], *([first, padding_idx] for first in firsts or [word])])
