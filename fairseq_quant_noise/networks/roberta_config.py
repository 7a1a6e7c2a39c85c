"""Read the options of fairseq's `roberta` that decide what it computes.

A packed file carries fairseq's model options as a plain dict; this reads them where fairseq is not installed, and
refuses those that `Roberta` would compute differently. Options that only act while training are left alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import UserError
from .encoder import EncoderConfig
from .options import (
    check_activation,
    check_heads,
    given_options,
    has_embedding_layer,
    number_of_layers,
    refuse_stock_int8,
)

_CURE = "evaluate it with fairseq-validate --user-dir instead"
FAIRSEQ_EPS = 1e-5  # what fairseq's LayerNorm adds to the variance
#: Options that change the function, with the values (besides None) that `Roberta` implements.
_ONLY: dict[str, tuple[Any, ...]] = {
    "adaptive_input": (False,),
    "no_token_positional_embeddings": (False,),
    "encoder_learned_pos": (True,),
    "no_scale_embedding": (True,),
    "spectral_norm_classification_head": (False,),
    "mha_heads_to_keep": (-1,),
    "ffn_blocks_to_remove": (-1,),
}


@dataclass(frozen=True)
class RobertaConfig:
    """What a `Roberta` is built from; the names are fairseq's option names, the defaults those of its `roberta`.

    Raises:
        UserError: options that contradict each other, naming them and the cure.
    """

    vocab_size: int
    # number of words, V, <mask> included
    padding_idx: int = 1
    # the padding word; it has no position, and nothing attends to it
    encoder_embed_dim: int = 768
    # width of the residual stream, C
    encoder_ffn_embed_dim: int = 3072
    # inner width of the feed-forward blocks
    encoder_layers: int = 12
    # number of layers; `from_fairseq` counts encoder_layers_to_keep instead where it is given
    encoder_attention_heads: int = 12
    # heads of every attention; a divisor of encoder_embed_dim
    encoder_normalize_before: bool = False
    # LayerNorm before each block, and after the last layer, instead of after each block
    layernorm_embedding: bool = True
    # LayerNorm after embedding and positions
    activation_fn: str = "gelu"
    # nonlinearity of the feed-forward blocks and of the language model's head, one of ACTIVATIONS
    pooler_activation_fn: str = "tanh"
    # nonlinearity of the classification heads, one of ACTIVATIONS
    max_positions: int = 512
    # the most tokens of a row
    untie_weights_roberta: bool = False
    # the language model's head has a weight of its own instead of the embedding's
    classification_heads: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    # by name: inner width and number of classes; no option of fairseq's, whose tasks add them
    quant_noise_embedding_layer: bool = False
    # the C x C Linear after the embedding (`has_embedding_layer`)
    layer_norm_eps: float = FAIRSEQ_EPS
    # what every LayerNorm adds to the variance; no option of fairseq's, whose own models have the default

    def __post_init__(self) -> None:
        check_activation("activation_fn", self.activation_fn, _CURE)
        check_activation("pooler_activation_fn", self.pooler_activation_fn, _CURE)
        check_heads("encoder", self.encoder_embed_dim, self.encoder_attention_heads)

    @property
    def encoder(self) -> EncoderConfig:
        """The part of it that embeds the tokens and has the layers."""
        return EncoderConfig(
            vocab_size=self.vocab_size,
            padding_idx=self.padding_idx,
            dim=self.encoder_embed_dim,
            ffn_dim=self.encoder_ffn_embed_dim,
            layers=self.encoder_layers,
            heads=self.encoder_attention_heads,
            activation_fn=self.activation_fn,
            normalize_before=self.encoder_normalize_before,
            layernorm_embedding=self.layernorm_embedding,
            scale_embedding=False,
            positions=True,
            learned_positions=self.max_positions,
            positions_option="max_positions",
            embedding_layer=self.quant_noise_embedding_layer,
            eps=self.layer_norm_eps,
        )

    @classmethod
    def from_fairseq(cls, options: Mapping[str, Any], vocab_size: int, padding_idx: int = 1) -> "RobertaConfig":
        """The configuration that fairseq's model options (its `cfg.model`, as a dict) describe.

        Args:
            options: fairseq's options by name, and `classification_heads`. One that is absent or None has its default;
                one that does not change what a trained network computes is ignored.
            vocab_size: the number of words in the dictionary, <mask> included.
            padding_idx: the dictionary's padding word.

        Raises:
            UserError: an option that changes the function is not implemented here, or holds no plain value.
        """
        for name, known in _ONLY.items():
            if options.get(name) is not None and options[name] not in known:
                raise UserError(f"option {name}={options[name]!r} is not implemented without fairseq; {_CURE}")
        refuse_stock_int8(options, _CURE)
        if options.get("max_positions") is None:
            options = {**options, "max_positions": options.get("tokens_per_sample")}  # as fairseq does
        given = given_options(options, [f.name for f in fields(cls)])
        kept = number_of_layers(options, "encoder", given.get("encoder_layers", cls.encoder_layers))
        given["encoder_layers"] = kept
        given["quant_noise_embedding_layer"] = has_embedding_layer(options)
        for name in ("activation_fn", "pooler_activation_fn"):
            if name in given:
                given[name] = str(given[name])  # Hydra gives a member of an enum
        return cls(**{**given, "vocab_size": vocab_size, "padding_idx": padding_idx})
