"""fairseq's `roberta` in plain PyTorch.

It exists to evaluate a packed file where fairseq is not installed: module paths, parameter and buffer names, ties and
results are those of `fairseq.models.roberta.RobertaModel`, so that a state dict of either loads strictly into the
other. Every weight is read from its module when it is used, since the package may have replaced it by codes. Dropout,
LayerDrop and fairseq's losses are left alone.

Shapes: B batch, T tokens, C channels, V vocabulary, K classes.
"""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .adaptive import new_embedding
from .attention import ACTIVATIONS, TransformerLayer, key_mask
from .positions import number_positions
from .roberta_config import RobertaConfig

__all__ = ["Roberta", "RobertaConfig", "modern_names"]


class SentenceEncoder(nn.Module):
    """Embedding and layers; the names below are fairseq's, in fairseq's order."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        dim, padding_idx = config.encoder_embed_dim, config.padding_idx
        self.config = config
        self.register_buffer("version", torch.tensor([3.0]))
        self.embed_tokens = new_embedding(config.vocab_size, dim, padding_idx)
        self.embed_positions = new_embedding(config.max_positions + padding_idx + 1, dim, padding_idx)
        self.layernorm_embedding = nn.LayerNorm(dim) if config.layernorm_embedding else None
        self.quant_noise = nn.Linear(dim, dim, bias=False) if config.quant_noise_embedding_layer else None
        self.layers = nn.ModuleList(_layer(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(dim) if config.encoder_normalize_before else None

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T) int64 -> (B, T, C)."""
        if tokens.shape[1] > self.config.max_positions:
            raise UserError(
                f"{tokens.shape[1]} tokens exceed max_positions {self.config.max_positions}; "
                "cut the text into shorter pieces"
            )
        padding = tokens.eq(self.config.padding_idx)
        x = self.embed_tokens(tokens) + self.embed_positions(number_positions(tokens, self.config.padding_idx))
        for after in (self.layernorm_embedding, self.quant_noise):
            x = x if after is None else after(x)
        x = x.masked_fill(padding.unsqueeze(-1), 0)
        mask = key_mask(padding)
        for layer in self.layers:
            x = layer(x, mask)
        return x if self.layer_norm is None else self.layer_norm(x)


class LMHead(nn.Linear):
    """Scores of every word: a layer of its own before the product with the embedding's weight, or its own.

    Args:
        tied: the (V, C) weight of the embedding, or None for one of its own.
    """

    def __init__(self, config: RobertaConfig, tied: Tensor | None) -> None:
        dim = config.encoder_embed_dim
        super().__init__(dim, config.vocab_size, bias=False, device=None if tied is None else "meta")
        if tied is not None:
            self.weight = tied
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.activation_fn = config.activation_fn
        self.dense = nn.Linear(dim, dim)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C) -> (..., V)."""
        x = self.layer_norm(ACTIVATIONS[self.activation_fn](self.dense(x)))
        return F.linear(x, self.weight) + self.bias


class ClassificationHead(nn.Module):
    """Scores of every class from the first token."""

    def __init__(self, dim: int, inner_dim: int, n_classes: int, activation_fn: str) -> None:
        super().__init__()
        self.activation_fn = activation_fn
        self.dense = nn.Linear(dim, inner_dim)
        self.out_proj = nn.Linear(inner_dim, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C) -> (B, K)."""
        return self.out_proj(ACTIVATIONS[self.activation_fn](self.dense(x[:, 0])))


class RobertaEncoder(nn.Module):
    """The sentence encoder and the language model's head."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.sentence_encoder = SentenceEncoder(config)
        words = self.sentence_encoder.embed_tokens
        self.lm_head = LMHead(config, None if config.untie_weights_roberta else words.weight)


class Roberta(nn.Module):
    """A RoBERTa that loads a state dict of fairseq's and computes the same as fairseq.

    Args:
        config: see `RobertaConfig`; `RobertaConfig.from_fairseq` reads fairseq's options.

    Example:
        >>> model = Roberta(RobertaConfig(vocab_size=100, encoder_layers=2, classification_heads={"mnli": (768, 3)}))
        >>> tokens = torch.full((1, 5), 7)
        >>> model(tokens).shape, model(tokens, "mnli").shape
        (torch.Size([1, 5, 100]), torch.Size([1, 3]))
    """

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = RobertaEncoder(config)
        self.classification_heads = nn.ModuleDict(
            {
                name: ClassificationHead(config.encoder_embed_dim, inner_dim, n_classes, config.pooler_activation_fn)
                for name, (inner_dim, n_classes) in config.classification_heads.items()
            }
        )

    def forward(self, src_tokens: Tensor, classification_head_name: str | None = None) -> Tensor:
        """Scores of every word at every place or, with a head's name, of every class of each row.

        Args:
            src_tokens: (B, T) int64; shorter rows are filled with `padding_idx` on the right.
            classification_head_name: one of the configuration's.

        Returns:
            Logits, (B, T, V) or (B, K).

        Raises:
            UserError: more tokens than positions, or no head of this name.
        """
        if classification_head_name is None:
            return self.encoder.lm_head(self.encoder.sentence_encoder(src_tokens))
        if classification_head_name not in self.classification_heads:
            known = ", ".join(self.classification_heads) or "none"
            raise UserError(f"no classification head {classification_head_name!r}; this network has {known}")
        return self.classification_heads[classification_head_name](self.encoder.sentence_encoder(src_tokens))


def _layer(config: RobertaConfig) -> TransformerLayer:
    return TransformerLayer(
        config.encoder_embed_dim,
        config.encoder_ffn_embed_dim,
        config.encoder_attention_heads,
        config.activation_fn,
        config.encoder_normalize_before,
        causal=False,
    )


def modern_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the names of fairseq 0.12; that of another model than RoBERTa comes back as it is.

    The published checkpoints say `decoder` for the encoder, hold the three projections of an attention in one
    `in_proj_weight`, and have no `version`.
    """
    names = [name for name in state if ".sentence_encoder." in name]
    if not names:
        return dict(state)
    modern: dict[str, Tensor] = {}
    for old, tensor in state.items():
        name = re.sub(r"^decoder\.", "encoder.", old).replace(".emb_layer_norm.", ".layernorm_embedding.")
        module, _, last = name.rpartition(".in_proj_")
        if module:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            modern |= {f"{module}.{letter}_proj.{last}": part for letter, part in parts}
        else:
            modern[name] = tensor
    return {"encoder.sentence_encoder.version": torch.tensor([1.0]), **modern}
