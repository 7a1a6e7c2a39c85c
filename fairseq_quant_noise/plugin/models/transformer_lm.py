"""Provide `quant_noise_transformer_lm`: fairseq's Transformer language model, with Quant-Noise and iPQ that work."""

from dataclasses import dataclass
from typing import Any

from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer_lm import (
    TransformerLanguageModel,
    TransformerLanguageModelConfig,
    base_lm_architecture,
    transformer_lm_baevski_wiki103,
)
from fairseq.modules.adaptive_softmax import TiedLinear

from ...weights.access import register_linear
from .options import QuantNoiseOptions, set_defaults
from .quantizable import Quantizable

register_linear(TiedLinear)


@dataclass
class QuantNoiseTransformerLanguageModelConfig(QuantNoiseOptions, TransformerLanguageModelConfig):
    """Hold fairseq's options unchanged (`--quant-noise-pq`, `--quant-noise-pq-block-size`, ...), and the noise's."""


@register_model("quant_noise_transformer_lm", dataclass=QuantNoiseTransformerLanguageModelConfig)
class QuantNoiseTransformerLanguageModel(Quantizable, TransformerLanguageModel):
    """Train fairseq's `transformer_lm` with noise on every Linear, Embedding and adaptive-softmax weight."""


register_model_architecture("quant_noise_transformer_lm", "quant_noise_transformer_lm_base")(base_lm_architecture)


@register_model_architecture("quant_noise_transformer_lm", "quant_noise_transformer_lm_wikitext103")
def wikitext103(args: Any) -> None:
    """Set the options of the paper's language model: 16 layers, 246.9 M parameters with WikiText-103's vocabulary."""
    set_defaults(args, dropout=0.2, decoder_attention_heads=8, decoder_layerdrop=0.2)
    transformer_lm_baevski_wiki103(args)


@register_model_architecture("quant_noise_transformer_lm", "quant_noise_transformer_lm_small")
def small(args: Any) -> None:
    """Set the options of a model for a CPU: 4 layers, d 128, embedding and softmax tied."""
    set_defaults(
        args,
        decoder_layers=4,
        decoder_embed_dim=128,
        decoder_ffn_embed_dim=512,
        decoder_attention_heads=4,
        share_decoder_input_output_embed=True,
        dropout=0.1,
    )
    base_lm_architecture(args)
