"""Say what of a network becomes a graph: what it computes, from which inputs, and which of their sizes are open.

A RoBERTa has a graph for the scores of words and one for each head. A model for translation has two, so that a program
encodes a sentence once and decodes it a word at a time. A graph called `step` takes the keys and values of the words
before, so that a word costs a step and not the whole text again; translation's goes with a graph called `source`, which
computes those of the source.

Shapes: B batch, T tokens, P tokens before, S tokens of the source, M channels of the encoder, N images, H x W pixels;
of the decoder L layers, A heads, D channels of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..networks import EfficientNet, Roberta, Transformer, TransformerLM
from ..networks.adaptive import AdaptiveInput
from ..networks.attention import Past, key_mask
from ..networks.decoder import TransformerDecoder

TOKENS = ("batch", "length")
SOURCE = ("batch", "source_length")
STEP, OF_SOURCE = "step", "source"
_BEFORE = 3  # words before, in an example


def _keys_values(length: str) -> tuple[str | None, ...]:
    """The sizes of keys and values, (L, 2, B, A, `length`, D)."""
    return (None, None, "batch", None, length, None)


@dataclass(frozen=True)
class Input:
    """An input of a graph."""

    example: Tensor  # what the network is traced with
    sizes: tuple[str | None, ...]  # of each dimension the name, where it is open


@dataclass(frozen=True)
class Part:
    """What a graph computes of a network."""

    run: Callable[..., Tensor | tuple[Tensor, ...]]  # from the inputs to the outputs, in their order
    inputs: dict[str, Input]
    outputs: dict[str, tuple[str | None, ...]]  # the sizes, as an input's


def part_of(network: torch.nn.Module, name: str | None) -> Part:
    """The part of a network that is called `name`.

    Args:
        network: one of this package's, its weights of any value.
        name: of a RoBERTa, one of its heads or None for the scores of words; of a language model, None or `step`; of a
            model for translation, `encoder`, `decoder`, `source` or `step`; of an EfficientNet, None.

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
        return {None: partial(_language_model, network), STEP: partial(_language_step, network)}
    if isinstance(network, Roberta):
        return {head: partial(_roberta, network, head) for head in (None, *network.classification_heads)}
    if isinstance(network, Transformer):
        return {
            "encoder": partial(_encoder, network),
            "decoder": partial(_decoder, network),
            OF_SOURCE: partial(_source, network),
            STEP: partial(_translation_step, network),
        }
    if isinstance(network, EfficientNet):
        return {None: partial(_image_network, network)}
    raise UserError(f"a {type(network).__name__} cannot be exported to ONNX; give a file of one of fairseq's models")


def _language_model(network: TransformerLM) -> Part:
    return Part(network, {"tokens": Input(_of_all_bands(network), TOKENS)}, {"scores": (*TOKENS, None)})


def _language_step(network: TransformerLM) -> Part:
    tokens = _of_all_bands(network)
    tokens = tokens.where(tokens.ne(network.config.padding_idx), tokens[0, 0])  # a step takes no padding
    inputs = {"tokens": Input(tokens, TOKENS), "past": _past(network.decoder, len(tokens))}

    def run(tokens: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        before = Past(past)
        return network.decoder(tokens, past=before), before.present()

    return Part(run, inputs, {"scores": (*TOKENS, None), "present": _keys_values("present_length")})


def _roberta(network: Roberta, head: str | None) -> Part:
    tokens = Input(_words(network.config.padding_idx), TOKENS)
    sizes = (*TOKENS, None) if head is None else ("batch", None)
    return Part(lambda given: network(given, head), {"tokens": tokens}, {"scores": sizes})


def _encoder(network: Transformer) -> Part:
    source = Input(_words(network.config.encoder.padding_idx), SOURCE)
    return Part(network.encoder, {"source": source}, {"memory": (*SOURCE, None)})


def _source(network: Transformer) -> Part:
    def run(source: Tensor) -> Tensor:
        return network.decoder.memory_keys(network.encoder(source))

    source = Input(_words(network.config.encoder.padding_idx), SOURCE)
    return Part(run, {"source": source}, {"memory": _keys_values("source_length")})


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

    return Part(run, inputs, {"scores": (*TOKENS, None)})


def _translation_step(network: Transformer) -> Part:
    padding_idx = network.config.encoder.padding_idx
    source = _words(padding_idx)
    past = _past(network.decoder, len(source))
    memory = past.example[..., :1, :].expand(-1, -1, -1, -1, source.shape[1], -1)  # (L, 2, B, A, S, D)
    inputs = {
        "tokens": Input(source[:, :1], TOKENS),
        "past": past,
        "memory": Input(memory, _keys_values("source_length")),
        "source": Input(source, SOURCE),
    }

    def run(tokens: Tensor, past: Tensor, memory: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        before = Past(past)
        return network.decoder(tokens, memory, key_mask(source.eq(padding_idx)), before), before.present()

    return Part(run, inputs, {"scores": (*TOKENS, None), "present": _keys_values("present_length")})


def _image_network(network: EfficientNet) -> Part:
    images = Input(torch.zeros(2, 3, 64, 64), ("batch", None, "height", "width"))
    return Part(network, {"images": images}, {"scores": ("batch", None)})


def _past(decoder: TransformerDecoder, batch: int) -> Input:
    nothing = decoder.new_past(batch)  # (L, 2, B, A, 0, D)
    return Input(F.pad(nothing, (0, 0, 0, _BEFORE)), _keys_values("past_length"))


def _of_all_bands(network: TransformerLM) -> Tensor:
    embedding = network.decoder.embed_tokens
    firsts = [first for first, _ in embedding.bands] if isinstance(embedding, AdaptiveInput) else [0]
    return _words(network.config.padding_idx, firsts)


def _words(padding_idx: int, firsts: list[int] | None = None) -> Tensor:
    """Example tokens (B, 2) that lead through every branch of a network: padding is there, and each band's words."""
    word = 0 if padding_idx else 1
    return torch.tensor([[word, word], *([first, padding_idx] for first in firsts or [word])])
