"""Implement fairseq's `TransformerEncoder` in plain PyTorch, for a RoBERTa and a model for translation.

Module paths, parameter and buffer names and results are fairseq's. Dropout and LayerDrop are left alone.

Shapes: B batch, T tokens, C channels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adaptive import new_embedding
from .attention import TransformerLayer, key_mask
from .positions import check_length, new_positions, number_positions


@dataclass(frozen=True)
class EncoderConfig:
    """What an encoder is built from."""

    vocab_size: int
    # number of words of the source, V
    padding_idx: int
    # the padding word; it has no position, and nothing attends to it
    dim: int
    # width of the residual stream, C
    ffn_dim: int
    # inner width of the feed-forward blocks
    layers: int
    # number of layers
    heads: int
    # heads of every attention; a divisor of dim
    activation_fn: str
    # nonlinearity of the feed-forward blocks, one of ACTIVATIONS
    normalize_before: bool
    # LayerNorm before each block, and after the last layer, instead of after each block
    layernorm_embedding: bool
    # LayerNorm after embedding and positions
    scale_embedding: bool
    # multiply the embedding by sqrt(dim)
    positions: bool
    # whether there are any
    learned_positions: int | None
    # the most tokens of a row, for learned positions; None: sinusoidal, without a limit
    positions_option: str
    # fairseq's name of that limit, for messages
    embedding_layer: bool
    # the C x C Linear after the embedding (`has_embedding_layer`)
    eps: float = 1e-5
    # what every LayerNorm adds to the variance


class TransformerEncoder(nn.Module):
    """Embedding and layers; the names below are fairseq's, in fairseq's order."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        dim, padding_idx = config.dim, config.padding_idx
        self.config = config
        self.register_buffer("version", torch.tensor([3.0]))
        self.embed_tokens = new_embedding(config.vocab_size, dim, padding_idx)
        self.embed_positions = new_positions(config.learned_positions, dim, padding_idx) if config.positions else None
        self.layernorm_embedding = nn.LayerNorm(dim, config.eps) if config.layernorm_embedding else None
        self.quant_noise = nn.Linear(dim, dim, bias=False) if config.embedding_layer else None
        self.layers = nn.ModuleList(_layer(config) for _ in range(config.layers))
        self.layer_norm = nn.LayerNorm(dim, config.eps) if config.normalize_before else None

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T) int64 -> (B, T, C).

        Raises:
            UserError: there are more tokens than learned positions.
        """
        padding = tokens.eq(self.config.padding_idx)
        x = self._embed(tokens).masked_fill(padding.unsqueeze(-1), 0)
        mask = key_mask(padding)
        for layer in self.layers:
            x = layer(x, mask)
        return x if self.layer_norm is None else self.layer_norm(x)

    def _embed(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, C)."""
        config = self.config
        x = self.embed_tokens(tokens)
        if config.scale_embedding:
            x = x * math.sqrt(config.dim)
        if self.embed_positions is not None:
            if config.learned_positions is not None:
                check_length(tokens.shape[1], config.positions_option, config.learned_positions)
            x = x + self.embed_positions(number_positions(tokens, config.padding_idx)).to(x.dtype)
        for after in (self.layernorm_embedding, self.quant_noise):
            x = x if after is None else after(x)
        return x


def _layer(config: EncoderConfig) -> TransformerLayer:
    return TransformerLayer(
        config.dim,
        config.ffn_dim,
        config.heads,
        config.activation_fn,
        config.normalize_before,
        causal=False,
        eps=config.eps,
    )
