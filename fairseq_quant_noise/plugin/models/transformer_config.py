# ruff: noqa: UP045 (fairseq reads `Optional`, not `| None`)
"""Define the options of fairseq's `transformer`, which has only command-line arguments, as a dataclass for Hydra.

fairseq's own dataclass nests them by encoder and decoder and is registered nowhere; these are flat, as on
the command line.
"""

from dataclasses import dataclass
from typing import Any, Optional

from fairseq import utils
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models.transformer import DEFAULT_MIN_PARAMS_TO_WRAP
from omegaconf import II

from .options import QuantNoiseOptions, option

Activation: Any = ChoiceEnum(utils.get_available_activation_fns())


@dataclass
class QuantNoiseTransformerConfig(QuantNoiseOptions, FairseqDataclass):
    """Hold fairseq's options by its names and with its defaults."""

    encoder_embed_path: Optional[str] = option(None, "text file of vectors that the source's embedding starts from")
    encoder_embed_dim: int = option(512, "width of the encoder")
    encoder_ffn_embed_dim: int = option(2048, "inner width of the encoder's feed-forward blocks")
    encoder_layers: int = option(6, "number of the encoder's layers")
    encoder_attention_heads: int = option(8, "number of the encoder's attention heads")
    encoder_normalize_before: bool = option(False, "layer norm before each block of the encoder")
    encoder_learned_pos: bool = option(False, "learned positions in the encoder")
    decoder_embed_path: Optional[str] = option(None, "text file of vectors that the target's embedding starts from")
    decoder_embed_dim: int = option(II("model.encoder_embed_dim"), "width of the decoder; by default the encoder's")
    decoder_ffn_embed_dim: int = option(
        II("model.encoder_ffn_embed_dim"), "inner width of the decoder's feed-forward blocks; by default the encoder's"
    )
    decoder_layers: int = option(6, "number of the decoder's layers")
    decoder_attention_heads: int = option(8, "number of the decoder's attention heads")
    decoder_normalize_before: bool = option(False, "layer norm before each block of the decoder")
    decoder_learned_pos: bool = option(False, "learned positions in the decoder")
    decoder_input_dim: int = option(II("model.decoder_embed_dim"), "as in fairseq, without effect in this model")
    decoder_output_dim: int = option(II("model.decoder_embed_dim"), "width of the features given to the softmax")
    no_decoder_final_norm: bool = option(False, "no layer norm after the decoder's last layer")
    activation_fn: Activation = option("relu", "nonlinearity of the feed-forward blocks")
    dropout: float = option(0.1, "dropout probability")
    attention_dropout: float = option(0.0, "dropout probability of attention weights")
    activation_dropout: float = option(0.0, "dropout probability after the nonlinearity")
    relu_dropout: float = option(0.0, "older name of activation_dropout")
    max_source_positions: int = option(1024, "the most tokens of a source")
    max_target_positions: int = option(1024, "the most tokens of a target")
    share_decoder_input_output_embed: bool = option(False, "the decoder's output uses its embedding")
    share_all_embeddings: bool = option(False, "encoder, decoder and output use one embedding; needs one dictionary")
    merge_src_tgt_embed: bool = option(False, "join two dictionaries, and share one embedding over both")
    no_token_positional_embeddings: bool = option(False, "no positions")
    layernorm_embedding: bool = option(False, "layer norm after the embedding")
    no_scale_embedding: bool = option(False, "do not multiply the embedding by the root of its width")
    adaptive_input: bool = option(False, "as in fairseq, without effect in this model")
    adaptive_softmax_cutoff: Optional[str] = option(None, "where bands of an adaptive softmax end; with adaptive_loss")
    adaptive_softmax_dropout: float = option(0.0, "dropout probability in the adaptive softmax")
    adaptive_softmax_factor: float = option(4, "how much narrower each band of the adaptive softmax is")
    tie_adaptive_weights: bool = option(False, "as in fairseq; needs adaptive input, which this model lacks")
    tie_adaptive_proj: bool = option(False, "as in fairseq; needs adaptive input, which this model lacks")
    encoder_layerdrop: float = option(0, "probability of leaving out a layer of the encoder in training (LayerDrop)")
    decoder_layerdrop: float = option(0, "probability of leaving out a layer of the decoder in training (LayerDrop)")
    encoder_layers_to_keep: Optional[str] = option(None, "the encoder's layers to keep when pruning, such as 0,2,4")
    decoder_layers_to_keep: Optional[str] = option(None, "the decoder's layers to keep when pruning, such as 0,2,4")
    encoder_xformers_att_config: Optional[str] = option(None, "xFormers attention of the encoder")
    decoder_xformers_att_config: Optional[str] = option(None, "xFormers attention of the decoder")
    no_cross_attention: bool = option(False, "not available here")
    cross_self_attention: bool = option(False, "not available here")
    checkpoint_activations: bool = option(False, "recompute activations in the backward pass, to save memory")
    offload_activations: bool = option(False, "the same, with the activations kept on the CPU")
    base_layers: Optional[int] = option(0, "number of BASE layers")
    base_sublayers: Optional[int] = option(1, "sublayers of each BASE layer")
    base_shuffle: Optional[int] = option(1, "shuffle tokens between workers before BASE layers")
    char_inputs: bool = option(False, "as in old checkpoints")
    export: bool = option(False, "layer norms that TorchScript can export")
    quant_noise_pq: float = option(0, "share of blocks that get noise in each training forward")
    quant_noise_pq_block_size: int = option(8, "numbers of a block")
    quant_noise_scalar: float = option(0, "share of numbers that get int8 noise; evaluation is in int8 then")
    min_params_to_wrap: int = option(DEFAULT_MIN_PARAMS_TO_WRAP, "smallest layer that FSDP wraps")
