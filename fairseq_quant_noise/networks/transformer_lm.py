"""fairseq's `transformer_lm` in plain PyTorch.

It exists to evaluate a packed file where fairseq is not installed: module paths, parameter and buffer names,
ties and results are those of `fairseq.models.transformer_lm.TransformerLanguageModel`, so that a state dict
of either loads strictly into the other. Every weight is read from its module when it is used, since the
package may have replaced it by codes. Dropout, LayerDrop, incremental decoding and fairseq's losses are left
alone.

Shapes: B batch, T tokens, C channels, V vocabulary.
"""

import math

import torch
from torch import Tensor, nn

from ..errors import UserError
from .adaptive import AdaptiveInput, AdaptiveSoftmax, new_embedding
from .attention import TransformerLayer, causal_mask
from .positions import SinusoidalPositions, number_positions
from .transformer_lm_config import TransformerLMConfig

__all__ = ["TransformerLM", "TransformerLMConfig"]


class TransformerDecoder(nn.Module):
    """Embedding, layers and softmax; the names below are fairseq's, in fairseq's order."""

    def __init__(self, config: TransformerLMConfig) -> None:
        super().__init__()
        dim = config.decoder_embed_dim
        self.config = config
        self.register_buffer("version", torch.tensor([3.0]))
        self.embed_tokens = _embedding(config)
        has_extra_linear = config.quant_noise_embedding_layer and not config.adaptive_input
        self.quant_noise = nn.Linear(dim, dim, bias=False) if has_extra_linear else None
        embedded = dim if config.adaptive_input else config.input_dim
        self.project_in_dim = nn.Linear(embedded, dim, bias=False) if embedded != dim else None
        self.embed_positions = _positions(config)
        self.layernorm_embedding = nn.LayerNorm(dim) if config.layernorm_embedding else None
        self.layers = nn.ModuleList(_layer(config) for _ in range(config.decoder_layers))
        has_final_norm = config.decoder_normalize_before and not config.no_decoder_final_norm
        self.layer_norm = nn.LayerNorm(dim) if has_final_norm else None
        output_dim = config.output_dim
        self.project_out_dim = nn.Linear(dim, output_dim, bias=False) if output_dim != dim else None
        if config.adaptive_softmax_cutoff:
            self.adaptive_softmax = _adaptive_softmax(config, self.embed_tokens)
        else:
            self.output_projection = _output_projection(config, self.embed_tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T) int64 -> (B, T, V), logits or (adaptive softmax) log-probabilities."""
        x = self.features(tokens)
        return self.adaptive_softmax(x) if self.config.adaptive_softmax_cutoff else self.output_projection(x)

    def features(self, tokens: Tensor) -> Tensor:
        """What the softmax sees: (B, T) int64 -> (B, T, decoder_output_dim)."""
        x = self._embed(tokens)
        mask = causal_mask(tokens.eq(self.config.padding_idx))
        for layer in self.layers:
            x = layer(x, mask)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return x if self.project_out_dim is None else self.project_out_dim(x)

    def _embed(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, C)."""
        config = self.config
        x = self.embed_tokens(tokens)
        if not config.no_scale_embedding:
            x = x * math.sqrt(config.decoder_embed_dim)
        for project in (self.quant_noise, self.project_in_dim):
            x = x if project is None else project(x)
        if self.embed_positions is not None:
            if config.decoder_learned_pos and tokens.shape[1] > config.max_target_positions:
                raise UserError(
                    f"{tokens.shape[1]} tokens exceed max_target_positions {config.max_target_positions}; "
                    "cut the text into shorter pieces"
                )
            x = x + self.embed_positions(number_positions(tokens, config.padding_idx)).to(x.dtype)
        return x if self.layernorm_embedding is None else self.layernorm_embedding(x)


class TransformerLM(nn.Module):
    """A language model that loads a state dict of fairseq's and computes the same as fairseq.

    Args:
        config: see `TransformerLMConfig`; `TransformerLMConfig.from_fairseq` reads fairseq's options.

    Example:
        >>> model = TransformerLM(TransformerLMConfig(vocab_size=100, decoder_layers=2))
        >>> model(torch.zeros(1, 5, dtype=torch.long)).shape
        torch.Size([1, 5, 100])
    """

    def __init__(self, config: TransformerLMConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = TransformerDecoder(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of every next word.

        Args:
            tokens: (B, T) int64; shorter rows are filled with `padding_idx` on the right.

        Returns:
            (B, T, V): logits; with an adaptive softmax, log-probabilities (a valid set of logits).

        Raises:
            UserError: more tokens than learned positions.
        """
        return self.decoder(tokens)


def _layer(config: TransformerLMConfig) -> TransformerLayer:
    return TransformerLayer(
        config.decoder_embed_dim,
        config.decoder_ffn_embed_dim,
        config.decoder_attention_heads,
        config.activation_fn,
        config.decoder_normalize_before,
    )


def _embedding(config: TransformerLMConfig) -> nn.Module:
    if not config.adaptive_input:
        return new_embedding(config.vocab_size, config.input_dim, config.padding_idx)
    return AdaptiveInput(
        config.vocab_size,
        config.padding_idx,
        config.input_dim,
        config.adaptive_input_factor,
        config.decoder_embed_dim,
        config.adaptive_input_cutoff,
    )


def _positions(config: TransformerLMConfig) -> nn.Module | None:
    if config.no_token_positional_embeddings:
        return None
    if config.decoder_learned_pos:
        n_rows = config.max_target_positions + config.padding_idx + 1
        return new_embedding(n_rows, config.decoder_embed_dim, config.padding_idx)
    return SinusoidalPositions(config.decoder_embed_dim, config.padding_idx)


def _adaptive_softmax(config: TransformerLMConfig, embed_tokens: nn.Module) -> AdaptiveSoftmax:
    tied = embed_tokens if config.tie_adaptive_weights and isinstance(embed_tokens, AdaptiveInput) else None
    return AdaptiveSoftmax(
        config.vocab_size,
        config.output_dim,
        config.adaptive_softmax_cutoff,
        config.adaptive_softmax_factor,
        tied,
        config.tie_adaptive_proj,
    )


def _output_projection(config: TransformerLMConfig, embed_tokens: nn.Module) -> nn.Linear:
    if config.share_decoder_input_output_embed and isinstance(embed_tokens, nn.Embedding):
        projection = nn.Linear(config.output_dim, config.vocab_size, bias=False, device="meta")  # no memory
        projection.weight = embed_tokens.weight
        return projection
    return nn.Linear(config.output_dim, config.vocab_size, bias=False)
