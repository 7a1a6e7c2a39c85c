"""Provide `quant_noise_transformer`: fairseq's Transformer for translation, with Quant-Noise and iPQ that work."""

from typing import Any

from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import (
    TransformerModel,
    TransformerModelBase,
    base_architecture,
    transformer_iwslt_de_en,
)
from torch import nn

from ...errors import UserError
from ..exits import exits_on_user_error
from .options import set_defaults
from .quantizable import Quantizable
from .transformer_config import QuantNoiseTransformerConfig

_NOT_HERE = ("no_cross_attention", "cross_self_attention")  # a packed file of such a network could not be read


@register_model("quant_noise_transformer", dataclass=QuantNoiseTransformerConfig)
class QuantNoiseTransformer(Quantizable, TransformerModel):
    """Train fairseq's `transformer` with noise on every Linear and Embedding, cross-attention and softmax included."""

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """Add the dataclass's options to the parser; fairseq's TransformerModel would add a list of its own."""
        super(TransformerModelBase, cls).add_args(parser)

    @classmethod
    def build_model(cls, args: Any, task: Any) -> nn.Module:
        """Build fairseq's model, with noise on its weights where the options ask for it.

        Raises:
            UserError: an option that cannot be compressed here, dictionaries or widths that cannot share an embedding,
                or as `Quantizable.build_model` (in fairseq's programs SystemExit, after one line).
        """
        with exits_on_user_error():
            _check(args, task)
        return super().build_model(args, task)


def _check(args: Any, task: Any) -> None:
    """Raise UserError for options that fairseq cannot build, or that this package cannot compress."""
    for name in _NOT_HERE:
        if getattr(args, name, False):
            raise UserError(
                f"--{name.replace('_', '-')}: a decoder without an attention of its own to the source cannot be "
                "compressed here; leave the option out, or train with --arch transformer"
            )
    if getattr(args, "share_all_embeddings", False):
        if task.source_dictionary != task.target_dictionary:
            raise UserError(
                "--share-all-embeddings: source and target have dictionaries of their own; binarize with "
                "--joined-dictionary, or give --share-decoder-input-output-embed instead"
            )
        if args.encoder_embed_dim != args.decoder_embed_dim:
            raise UserError(
                f"--share-all-embeddings: --encoder-embed-dim {args.encoder_embed_dim} and --decoder-embed-dim "
                f"{args.decoder_embed_dim} differ; make them alike"
            )


register_model_architecture("quant_noise_transformer", "quant_noise_transformer_base")(base_architecture)
register_model_architecture("quant_noise_transformer", "quant_noise_transformer_iwslt_de_en")(transformer_iwslt_de_en)


@register_model_architecture("quant_noise_transformer", "quant_noise_transformer_small")
def small(args: Any) -> None:
    """Set the options of a model for a CPU: 3 + 3 layers, d 128."""
    set_defaults(
        args,
        encoder_layers=3,
        encoder_embed_dim=128,
        encoder_ffn_embed_dim=512,
        encoder_attention_heads=4,
        decoder_layers=3,
        decoder_attention_heads=4,
    )
    base_architecture(args)
