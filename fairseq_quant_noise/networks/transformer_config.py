"""Read the options of fairseq's `transformer`, a model for translation, that decide what it computes.

A packed file carries fairseq's model options as a plain dict; this reads them where fairseq is not installed, and
refuses those that `Transformer` would compute differently. Options that only act while training are left alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .decoder_config import NOT_HERE, TransformerLMConfig
from .encoder import EncoderConfig
from .options import check_activation, check_heads, given_options, has_embedding_layer, number_of_layers, refuse_options

_CURE = "evaluate it with fairseq-generate --user-dir instead"
#: Options that change the function and that `Transformer` lacks; unset, zero and false are fine.
_NOT_HERE = (*NOT_HERE, "no_cross_attention", "encoder_xformers_att_config", "char_inputs", "tie_adaptive_weights")
#: fairseq's default where the decoder is not said to differ from the encoder.
_AS_THE_ENCODER = ("embed_dim", "ffn_embed_dim")
_ENCODER_DEFAULTS: dict[str, Any] = {
    "encoder_embed_dim": 512,
    "encoder_ffn_embed_dim": 2048,
    "encoder_layers": 6,
    "encoder_attention_heads": 8,
    "encoder_normalize_before": False,
    "encoder_learned_pos": False,
    "max_source_positions": 1024,
    "no_token_positional_embeddings": False,
    "layernorm_embedding": False,
    "no_scale_embedding": False,
    "activation_fn": "relu",
}


@dataclass(frozen=True)
class TransformerConfig:
    """What a `Transformer` is built from.

    Raises:
        UserError: the encoder and the decoder are to share an embedding, and cannot.
    """

    encoder: EncoderConfig
    # the source's side
    decoder: TransformerLMConfig
    # the target's side; its options are those of a language model
    share_all_embeddings: bool = False
    # encoder, decoder and (without an adaptive softmax) output have one embedding

    def __post_init__(self) -> None:
        source = (self.encoder.vocab_size, self.encoder.dim)
        target = (self.decoder.vocab_size, self.decoder.decoder_embed_dim)
        if self.share_all_embeddings and source != target:
            raise UserError(
                f"share_all_embeddings: {source[0]} words of {source[1]} numbers in the encoder and {target[0]} of "
                f"{target[1]} in the decoder; make both alike, or share the decoder's alone"
            )

    @classmethod
    def from_fairseq(cls, options: Mapping[str, Any], vocab_size: int, padding_idx: int = 1) -> "TransformerConfig":
        """The configuration that fairseq's model options (its `cfg.model`, as a dict) describe.

        Args:
            options: fairseq's options by name, and `source_vocab_size` where the source has a dictionary of its own.
                One that is absent or None has its default; one that does not change what a trained network computes
                is ignored.
            vocab_size: the number of words in the target's dictionary.
            padding_idx: the dictionaries' padding word.

        Raises:
            UserError: an option that changes the function is not implemented here, or holds no plain value.
        """
        refuse_options(options, _NOT_HERE, _CURE)
        shared = bool(options.get("share_all_embeddings") or options.get("merge_src_tgt_embed"))
        layer = has_embedding_layer(options) and not options.get("adaptive_input")
        encoder = _encoder(options, vocab_size, padding_idx, layer)
        as_encoder = {f"decoder_{name}": options.get(f"encoder_{name}") for name in _AS_THE_ENCODER}
        of_decoder = {
            **options,
            **{name: value for name, value in as_encoder.items() if options.get(name) is None},
            "decoder_input_dim": None,  # fairseq makes a plain embedding, as wide as the layers
            "adaptive_input": False,
            "share_decoder_input_output_embed": shared or options.get("share_decoder_input_output_embed"),
        }
        decoder = TransformerLMConfig.from_fairseq(of_decoder, vocab_size, padding_idx)
        return cls(encoder, decoder, shared)


def _encoder(options: Mapping[str, Any], vocab_size: int, padding_idx: int, layer: bool) -> EncoderConfig:
    given = _ENCODER_DEFAULTS | given_options(options, [*_ENCODER_DEFAULTS, "source_vocab_size"])
    activation_fn = str(given["activation_fn"])  # Hydra gives a member of an enum
    check_activation("activation_fn", activation_fn, _CURE)
    check_heads("encoder", given["encoder_embed_dim"], given["encoder_attention_heads"])
    return EncoderConfig(
        vocab_size=given.get("source_vocab_size", vocab_size),
        padding_idx=padding_idx,
        dim=given["encoder_embed_dim"],
        ffn_dim=given["encoder_ffn_embed_dim"],
        layers=number_of_layers(options, "encoder", given["encoder_layers"]),
        heads=given["encoder_attention_heads"],
        activation_fn=activation_fn,
        normalize_before=given["encoder_normalize_before"],
        layernorm_embedding=given["layernorm_embedding"],
        scale_embedding=not given["no_scale_embedding"],
        positions=not given["no_token_positional_embeddings"],
        learned_positions=given["max_source_positions"] if given["encoder_learned_pos"] else None,
        positions_option="max_source_positions",
        embedding_layer=layer,
    )
