"""Read the options of fairseq's `transformer_lm` that decide what it computes.

A packed file carries fairseq's model options as a plain dict; this reads them where fairseq is not
installed, and refuses those that `TransformerLM` would compute differently from fairseq. Options that only
act while training (dropouts, LayerDrop, activation checkpointing) are left alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import UserError
from .options import (
    check_activation,
    check_heads,
    given_options,
    has_embedding_layer,
    integers,
    number_of_layers,
    refuse_options,
)

_CURE = "evaluate it with fairseq-eval-lm --user-dir instead"
#: Options that change the function and that `TransformerLM` lacks; unset, zero and false are fine.
NOT_HERE = (
    "character_embeddings",
    "base_layers",
    "decoder_xformers_att_config",
    "scale_fc",
    "scale_attn",
    "scale_heads",
    "scale_resids",
    "cross_self_attention",
)


@dataclass(frozen=True)
class TransformerLMConfig:
    """What a `TransformerLM` is built from; the names are fairseq's option names.

    Raises:
        UserError: options that contradict each other, naming them and the cure.
    """

    vocab_size: int
    # number of words, V
    padding_idx: int = 1
    # the padding word; it has no position, and nothing attends to it
    decoder_embed_dim: int = 512
    # width of the residual stream, C
    decoder_input_dim: int | None = None
    # width of the embedding; None: decoder_embed_dim. Another width adds project_in_dim
    decoder_output_dim: int | None = None
    # width of the features given to the softmax; None: decoder_embed_dim. Another width adds project_out_dim
    decoder_ffn_embed_dim: int = 2048
    # inner width of the feed-forward blocks
    decoder_layers: int = 6
    # number of layers; `from_fairseq` counts decoder_layers_to_keep instead where it is given
    decoder_attention_heads: int = 8
    # heads of every attention; a divisor of decoder_embed_dim
    decoder_normalize_before: bool = False
    # LayerNorm before each block (and after the last layer) instead of after each block
    no_decoder_final_norm: bool = False
    # with decoder_normalize_before: no LayerNorm after the last layer
    activation_fn: str = "relu"
    # nonlinearity of the feed-forward blocks, one of ACTIVATIONS
    max_target_positions: int = 1024
    # rows of the learned positions; sinusoidal ones have no limit
    no_token_positional_embeddings: bool = False
    # no positions at all
    decoder_learned_pos: bool = False
    # learned positions instead of sinusoidal ones
    layernorm_embedding: bool = False
    # LayerNorm after embedding and positions
    no_scale_embedding: bool = False
    # do not multiply the embedding by sqrt(decoder_embed_dim)
    share_decoder_input_output_embed: bool = False
    # plain softmax: its weight is the embedding's
    adaptive_input: bool = False
    # embed rarer bands of the vocabulary in fewer dimensions
    adaptive_input_cutoff: tuple[int, ...] = ()
    # where each band but the last ends
    adaptive_input_factor: float = 4.0
    # how much narrower each band is than the one before
    adaptive_softmax_cutoff: tuple[int, ...] = ()
    # where the head and each tail but the last end; (): a plain softmax
    adaptive_softmax_factor: float = 4.0
    # how much narrower each tail is than the one before
    tie_adaptive_weights: bool = False
    # the adaptive softmax uses the embeddings of the adaptive input
    tie_adaptive_proj: bool = False
    # with tie_adaptive_weights: its tails use the projections of the adaptive input too, transposed
    quant_noise_embedding_layer: bool = False
    # without adaptive_input: the C x C Linear after the embedding (`has_embedding_layer`)

    def __post_init__(self) -> None:
        check_activation("activation_fn", self.activation_fn, _CURE)
        check_heads("decoder", self.decoder_embed_dim, self.decoder_attention_heads)
        _check_cutoffs("adaptive_softmax_cutoff", self.adaptive_softmax_cutoff, self.vocab_size)
        _check_cutoffs("adaptive_input_cutoff", self.adaptive_input_cutoff, self.vocab_size)
        self._check_ties()

    def _check_ties(self) -> None:
        if self.adaptive_input and not self.adaptive_input_cutoff:
            raise UserError("adaptive_input needs bands; give adaptive_input_cutoff")
        shared = self.share_decoder_input_output_embed and not self.adaptive_softmax_cutoff
        if shared and (self.adaptive_input or self.input_dim != self.output_dim):
            raise UserError(
                "share_decoder_input_output_embed needs a plain embedding and decoder_input_dim equal to "
                "decoder_output_dim; untie them, or give an adaptive_softmax_cutoff"
            )
        alike = (
            self.adaptive_input
            and self.adaptive_input_cutoff == self.adaptive_softmax_cutoff
            and self.adaptive_input_factor == self.adaptive_softmax_factor
            and self.input_dim == self.output_dim == self.decoder_embed_dim
        )
        if self.tie_adaptive_weights and not alike:
            raise UserError(
                "tie_adaptive_weights needs adaptive_input, the same cutoff and factor for adaptive input"
                " and softmax, and equal decoder_input_dim, decoder_output_dim and decoder_embed_dim; "
                "make them equal, or untie"
            )

    @property
    def input_dim(self) -> int:
        """Width of the embedding."""
        return self.decoder_embed_dim if self.decoder_input_dim is None else self.decoder_input_dim

    @property
    def output_dim(self) -> int:
        """Width of the features given to the softmax."""
        return self.decoder_embed_dim if self.decoder_output_dim is None else self.decoder_output_dim

    @classmethod
    def from_fairseq(cls, options: Mapping[str, Any], vocab_size: int, padding_idx: int = 1) -> "TransformerLMConfig":
        """The configuration that fairseq's model options (its `cfg.model`, as a dict) describe.

        Args:
            options: fairseq's options by name. One that is absent or None has its default; one that does
                not change what a trained network computes is ignored.
            vocab_size: the number of words in the dictionary.
            padding_idx: the dictionary's padding word.

        Raises:
            UserError: an option that changes the function is not implemented here, or holds no plain value.
        """
        refuse_options(options, NOT_HERE, _CURE)
        if options.get("max_target_positions") is None:
            options = {**options, "max_target_positions": options.get("tokens_per_sample")}  # as fairseq does
        given = given_options(options, [f.name for f in fields(cls)])
        for name in ("adaptive_input_cutoff", "adaptive_softmax_cutoff"):
            given[name] = integers(name, options.get(name))
        kept = number_of_layers(options, "decoder", given.get("decoder_layers", cls.decoder_layers))
        given["decoder_layers"] = kept
        given["quant_noise_embedding_layer"] = has_embedding_layer(options)
        if "activation_fn" in given:
            given["activation_fn"] = str(given["activation_fn"])  # Hydra gives a member of an enum
        given.update(_old_options(options))
        return cls(**{**given, "vocab_size": vocab_size, "padding_idx": padding_idx})


def _old_options(options: Mapping[str, Any]) -> dict[str, bool]:
    """Two option names of 2019's checkpoints, as fairseq's `base_lm_architecture` still reads them."""
    modern: dict[str, bool] = {}
    if "no_tie_adaptive_proj" in options:
        modern["no_decoder_final_norm"] = True
        if options["no_tie_adaptive_proj"] is False:
            modern["tie_adaptive_proj"] = True
    if "decoder_final_norm" in options:
        modern["no_decoder_final_norm"] = not options["decoder_final_norm"]
    return modern


def _check_cutoffs(name: str, cutoffs: tuple[int, ...], vocab_size: int) -> None:
    bounds = (0, *cutoffs)
    if any(low >= high for low, high in zip(bounds, bounds[1:], strict=False)) or bounds[-1] > vocab_size:
        raise UserError(
            f"{name} {','.join(map(str, cutoffs))} does not cut a vocabulary of {vocab_size} words; "
            "give increasing numbers up to its size"
        )
