# ruff: noqa: UP045 (fairseq reads `Optional`, not `| None`)
"""Define the options of fairseq's `roberta`, which has only command-line arguments, as a dataclass for Hydra."""

from dataclasses import dataclass
from typing import Any, Optional

from fairseq import utils
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models.transformer import DEFAULT_MIN_PARAMS_TO_WRAP

from .options import QuantNoiseOptions, option

Activation: Any = ChoiceEnum(utils.get_available_activation_fns())


@dataclass
class QuantNoiseRobertaConfig(QuantNoiseOptions, FairseqDataclass):
    """Hold fairseq's options by its names and with its defaults; None where an architecture sets the value."""

    encoder_layers: Optional[int] = option(None, "number of layers")
    encoder_embed_dim: Optional[int] = option(None, "width of embedding and layers")
    encoder_ffn_embed_dim: Optional[int] = option(None, "inner width of the feed-forward blocks")
    encoder_attention_heads: Optional[int] = option(None, "number of attention heads")
    activation_fn: Optional[Activation] = option(None, "nonlinearity of the layers")
    pooler_activation_fn: Optional[Activation] = option(None, "nonlinearity of the classification heads")
    encoder_normalize_before: Optional[bool] = option(None, "layer norm before each block")
    layernorm_embedding: Optional[bool] = option(None, "layer norm after the embedding")
    dropout: Optional[float] = option(None, "dropout probability")
    attention_dropout: Optional[float] = option(None, "dropout probability of attention weights")
    activation_dropout: Optional[float] = option(None, "dropout probability after the nonlinearity")
    pooler_dropout: Optional[float] = option(None, "dropout probability in classification heads")
    max_positions: Optional[int] = option(None, "the most tokens of a row; by default the task's")
    load_checkpoint_heads: Optional[bool] = option(None, "take over the classification heads that a checkpoint has")
    untie_weights_roberta: Optional[bool] = option(None, "give the language model's head a weight of its own")
    encoder_layerdrop: float = option(0, "probability of leaving out a layer in training (LayerDrop)")
    encoder_layers_to_keep: Optional[str] = option(None, "layers to keep when pruning, as numbers separated by commas")
    quant_noise_pq: float = option(0, "share of blocks that get noise in each training forward")
    quant_noise_pq_block_size: int = option(8, "numbers of a block")
    quant_noise_scalar: float = option(0, "share of numbers that get int8 noise; evaluation is in int8 then")
    spectral_norm_classification_head: bool = option(False, "spectral normalization of classification heads")
    min_params_to_wrap: int = option(DEFAULT_MIN_PARAMS_TO_WRAP, "smallest layer that FSDP wraps")
    mha_reg_scale_factor: float = option(0.0, "AdaPrune: weight of the regularization of attention")
    ffn_reg_scale_factor: float = option(0.0, "AdaPrune: weight of the regularization of feed-forward blocks")
    mha_heads_to_keep: int = option(-1, "AdaPrune: not available here")
    ffn_blocks_to_remove: int = option(-1, "AdaPrune: not available here")
