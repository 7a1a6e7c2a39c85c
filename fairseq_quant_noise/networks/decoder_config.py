"""The options of fairseq's `transformer_lm` that decide what it computes.

A packed file carries fairseq's model options as a plain dict; this reads them where fairseq is not
installed, and refuses those that `TransformerLM` would compute differently from fairseq. Options that only
act while training (dropouts, LayerDrop, activation checkpointing) are left alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..errors import UserError
from ..structure.layer_map import EVERY_OTHER, kept_layers, parse_keep
from .attention import ACTIVATIONS

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


def given_options(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The options among `names` that have a value."""
    given = {name: options[name] for name in names if options.get(name) is not None}
    for name, value in given.items():
        if isinstance(value, str) and "${" in value:
            cure = "resolve it first, with OmegaConf.to_container(cfg, resolve=True)"
            raise UserError(f"option {name} is {value!r}, a reference to another option; {cure}")
    return given


def number_of_layers(options: Mapping[str, Any], side: str, n_layers: int) -> int:
    """Layers in use: `n_layers`, or those that fairseq's `*_layers_to_keep` leaves; `side` is encoder or decoder."""
    name = f"{side}_layers_to_keep"
    given = options.get(name)
    if not given:
        return n_layers
    keep = parse_keep(name, given.strip("[]() ") if isinstance(given, str) else given)
    chunk = int(options.get("share_layers") or 1)
    return len(kept_layers(name, keep, side, n_layers, chunk)) if keep == EVERY_OTHER else len(keep)


def has_embedding_layer(options: Mapping[str, Any]) -> bool:
    """Whether there is a bias-free C x C Linear after the embedding: in stock fairseq with its noise, here if asked."""
    if is_ours(options):
        return bool(options.get("quant_noise_embedding_layer"))
    return given_options(options, ["quant_noise_pq"]).get("quant_noise_pq", 0) > 0


def is_ours(options: Mapping[str, Any]) -> bool:
    """Whether the options are of a model of this package, rather than of fairseq's."""
    name = options.get("_name") or options.get("arch") or ""
    return str(name).startswith("quant_noise_")


def refuse_options(options: Mapping[str, Any], names: Sequence[str], cure: str) -> None:
    """Raise UserError where an option among `names` is set, or fairseq's own int8 is."""
    for name in names:
        if options.get(name):
            raise UserError(f"option {name}={options[name]!r} is not implemented without fairseq; {cure}")
    refuse_stock_int8(options, cure)


def refuse_stock_int8(options: Mapping[str, Any], cure: str) -> None:
    """Raise UserError for `--quant-noise-scalar` of fairseq's own models."""
    if options.get("quant_noise_scalar") and not is_ours(options):
        raise UserError(
            f"option quant_noise_scalar={options['quant_noise_scalar']!r}: stock fairseq rounds weights and "
            f"activations to int8 in evaluation too, which is not implemented without fairseq; {cure}, "
            "or set it to 0 to evaluate the weights as they are stored"
        )


def check_activation(name: str, value: str, cure: str) -> None:
    """Raise UserError for a nonlinearity that is not in ACTIVATIONS."""
    if value not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"{name} {value!r} is not implemented without fairseq (only {known}); {cure}")


def check_heads(side: str, dim: int, n_heads: int) -> None:
    """Raise UserError for attention heads that do not divide the width; `side` is encoder or decoder."""
    if dim % n_heads:
        raise UserError(
            f"{side}_attention_heads {n_heads} does not divide {side}_embed_dim {dim}; "
            "choose a number of heads that does"
        )


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


def integers(name: str, value: Any) -> tuple[int, ...]:
    """'20000,60000', a list, one number or None as a tuple, without fairseq's eval() of the string."""
    parts = value.strip("[]() ").split(",") if isinstance(value, str) else value
    if parts is None:
        return ()
    try:
        return tuple(int(part) for part in ([parts] if isinstance(parts, int) else parts) if part != "")
    except (TypeError, ValueError):
        raise UserError(f"option {name} is {value!r}; give integers separated by commas") from None


def _check_cutoffs(name: str, cutoffs: tuple[int, ...], vocab_size: int) -> None:
    bounds = (0, *cutoffs)
    if any(low >= high for low, high in zip(bounds, bounds[1:], strict=False)) or bounds[-1] > vocab_size:
        raise UserError(
            f"{name} {','.join(map(str, cutoffs))} does not cut a vocabulary of {vocab_size} words; "
            "give increasing numbers up to its size"
        )
