"""Implement fairseq's `transformer_lm` in plain PyTorch.

It exists to evaluate a packed file where fairseq is not installed: module paths, parameter and buffer names,
ties and results are those of `fairseq.models.transformer_lm.TransformerLanguageModel`, so that a state dict
of either loads strictly into the other. Every weight is read from its module when it is used, since the
package may have replaced it by codes. Dropout, LayerDrop and fairseq's losses are left alone.

Shapes: B batch, T tokens, V vocabulary.
"""

from torch import Tensor, nn

from .decoder import TransformerDecoder
from .decoder_config import TransformerLMConfig

__all__ = ["TransformerLM", "TransformerLMConfig"]


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
