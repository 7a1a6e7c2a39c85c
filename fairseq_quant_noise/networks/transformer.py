"""Implement fairseq's `transformer`, a model for translation, in plain PyTorch.

It exists to evaluate a packed file where fairseq is not installed: module paths, parameter and buffer names, ties and
results are those of `fairseq.models.transformer.TransformerModel`, so that a state dict of either loads strictly into
the other. Every weight is read from its module when it is used, since the package may have replaced it by codes.
Dropout, LayerDrop, beam search and fairseq's losses are left alone.

Shapes: B batch, S tokens of the source, T tokens of the target, M channels of the encoder, V vocabulary of the target.
"""

from torch import Tensor, nn

from .attention import key_mask
from .decoder import TransformerDecoder
from .encoder import TransformerEncoder
from .transformer_config import TransformerConfig

__all__ = ["Transformer", "TransformerConfig"]


class Transformer(nn.Module):
    """A model for translation that loads a state dict of fairseq's and computes the same as fairseq.

    Args:
        config: see `TransformerConfig`; `TransformerConfig.from_fairseq` reads fairseq's options.

    Example:
        >>> model = Transformer(TransformerConfig.from_fairseq({"encoder_layers": 2, "decoder_layers": 2}, 100))
        >>> model(torch.full((1, 7), 5), torch.full((1, 3), 6)).shape
        torch.Size([1, 3, 100])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TransformerEncoder(config.encoder)
        shared = self.encoder.embed_tokens if config.share_all_embeddings else None
        self.decoder = TransformerDecoder(config.decoder, config.encoder.dim, shared)

    def forward(self, src_tokens: Tensor, prev_output_tokens: Tensor) -> Tensor:
        """Scores of every next word of the translation.

        Args:
            src_tokens: (B, S) int64, each row with `</s>` at its end; shorter rows are filled with `padding_idx` on
                either side.
            prev_output_tokens: (B, T) int64, the translation so far, from `</s>` on; filled on the right.

        Returns:
            (B, T, V): logits; with an adaptive softmax, log-probabilities (a valid set of logits).

        Raises:
            UserError: more tokens than learned positions.
        """
        memory_mask = key_mask(src_tokens.eq(self.config.encoder.padding_idx))
        return self.decoder(prev_output_tokens, self.encoder(src_tokens), memory_mask)
