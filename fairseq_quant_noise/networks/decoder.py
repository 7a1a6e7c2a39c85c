"""Implement fairseq's `TransformerDecoder` in plain PyTorch, for a language model and a model for translation.

Module paths, parameter and buffer names and results are fairseq's. Dropout and LayerDrop are left alone.

Shapes: B batch, T tokens, S tokens of the memory (the encoder's output), P tokens before, C channels, M channels of the
memory, V vocabulary, L layers, H heads.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

from .adaptive import AdaptiveInput, AdaptiveSoftmax, new_embedding
from .attention import Past, TransformerLayer, causal_mask
from .decoder_config import TransformerLMConfig
from .positions import SinusoidalPositions, check_length, new_positions, number_positions


class TransformerDecoder(nn.Module):
    """Embedding, layers and softmax; the names below are fairseq's, in fairseq's order.

    Args:
        config: its options.
        memory_dim: M of the encoder whose output the layers attend to; None for a language model.
        embed_tokens: the encoder's embedding, where both share one.
    """

    def __init__(
        self, config: TransformerLMConfig, memory_dim: int | None = None, embed_tokens: nn.Module | None = None
    ) -> None:
        super().__init__()
        dim = config.decoder_embed_dim
        self.config = config
        self.register_buffer("version", torch.tensor([3.0]))
        self.embed_tokens = _embedding(config) if embed_tokens is None else embed_tokens
        has_extra_linear = config.quant_noise_embedding_layer and not config.adaptive_input
        self.quant_noise = nn.Linear(dim, dim, bias=False) if has_extra_linear else None
        embedded = dim if config.adaptive_input else config.input_dim
        self.project_in_dim = nn.Linear(embedded, dim, bias=False) if embedded != dim else None
        self.embed_positions = _positions(config)
        self.layernorm_embedding = nn.LayerNorm(dim) if config.layernorm_embedding else None
        self.layers = nn.ModuleList(_layer(config, memory_dim) for _ in range(config.decoder_layers))
        has_final_norm = config.decoder_normalize_before and not config.no_decoder_final_norm
        self.layer_norm = nn.LayerNorm(dim) if has_final_norm else None
        output_dim = config.output_dim
        self.project_out_dim = nn.Linear(dim, output_dim, bias=False) if output_dim != dim else None
        if config.adaptive_softmax_cutoff:
            self.adaptive_softmax = _adaptive_softmax(config, self.embed_tokens)
        else:
            self.output_projection = _output_projection(config, self.embed_tokens)

    def forward(
        self,
        tokens: Tensor,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """tokens: (B, T) int64 -> (B, T, V), logits or (adaptive softmax) log-probabilities.

        Args:
            tokens: the words so far; with `past`, those that are new, without padding.
            memory: (B, S, M), what the encoder made of the source, or what `memory_keys` makes of that.
            memory_mask: `key_mask` of the source.
            past: the keys and values of the words before.
        """
        x = self.features(tokens, memory, memory_mask, past)
        return self.adaptive_softmax(x) if self.config.adaptive_softmax_cutoff else self.output_projection(x)

    def features(
        self,
        tokens: Tensor,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """What the softmax sees: (B, T) int64 -> (B, T, decoder_output_dim)."""
        x = self._embed(tokens, 0 if past is None else past.length)
        mask = causal_mask(tokens.eq(self.config.padding_idx)) if past is None else past.mask(tokens.shape[1])
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, memory[i] if memory is not None and memory.dim() == 6 else memory, memory_mask, past)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return x if self.project_out_dim is None else self.project_out_dim(x)

    def memory_keys(self, memory: Tensor) -> Tensor:
        """The keys and values of each layer's attention to the memory (B, S, M): (L, 2, B, H, S, C/H)."""
        attentions = (cast(TransformerLayer, layer).encoder_attn for layer in self.layers)
        return torch.stack([torch.stack(attention.keys_values(memory)) for attention in attentions if attention])

    def new_past(self, batch: int) -> Tensor:
        """The `Past` before the first word: (L, 2, B, H, 0, C/H)."""
        heads = self.config.decoder_attention_heads
        return torch.zeros(len(self.layers), 2, batch, heads, 0, self.config.decoder_embed_dim // heads)

    def _embed(self, tokens: Tensor, before: int) -> Tensor:
        """(B, T) -> (B, T, C); so many words are before them."""
        config = self.config
        x = self.embed_tokens(tokens)
        if not config.no_scale_embedding:
            x = x * math.sqrt(config.decoder_embed_dim)
        for project in (self.quant_noise, self.project_in_dim):
            x = x if project is None else project(x)
        if self.embed_positions is not None:
            if config.decoder_learned_pos:
                check_length(before + tokens.shape[1], "max_target_positions", config.max_target_positions)
            elif isinstance(self.embed_positions, SinusoidalPositions):
                self.embed_positions.reach(before + tokens.shape[1], tokens.device)
            positions = number_positions(tokens, config.padding_idx)
            x = x + self.embed_positions(positions + before if before else positions).to(x.dtype)
        return x if self.layernorm_embedding is None else self.layernorm_embedding(x)


def _layer(config: TransformerLMConfig, memory_dim: int | None) -> TransformerLayer:
    return TransformerLayer(
        config.decoder_embed_dim,
        config.decoder_ffn_embed_dim,
        config.decoder_attention_heads,
        config.activation_fn,
        config.decoder_normalize_before,
        memory_dim=memory_dim,
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
    rows = config.max_target_positions if config.decoder_learned_pos else None
    return new_positions(rows, config.decoder_embed_dim, config.padding_idx)


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
