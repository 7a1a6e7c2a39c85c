"""Implement fairseq's `roberta` in plain PyTorch.

It exists to evaluate a packed file where fairseq is not installed: module paths, parameter and buffer names, ties and
results are those of `fairseq.models.roberta.RobertaModel`, so that a state dict of either loads strictly into the
other. Every weight is read from its module when it is used, since the package may have replaced it by codes. Dropout,
LayerDrop and fairseq's losses are left alone.

Shapes: B batch, T tokens, C channels, V vocabulary, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .attention import activate
from .encoder import TransformerEncoder
from .roberta_config import RobertaConfig

__all__ = ["Roberta", "RobertaConfig"]


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
        self.layer_norm = nn.LayerNorm(dim, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C) -> (..., V)."""
        x = self.layer_norm(activate(self.dense(x), self.activation_fn))
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
        return self.out_proj(activate(self.dense(x[:, 0]), self.activation_fn))


class RobertaEncoder(nn.Module):
    """The sentence encoder and the language model's head."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.sentence_encoder = TransformerEncoder(config.encoder)
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
