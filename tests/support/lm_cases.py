"""Option sets of transformer_lm, fairseq's model for each, and batches to compare on."""

from argparse import Namespace
from types import SimpleNamespace

import torch

from fairseq_quant_noise.networks import TransformerLM, TransformerLMConfig

VOCAB = 60
PAD = 1
SMALL = {
    "decoder_embed_dim": 32,
    "decoder_ffn_embed_dim": 48,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "max_target_positions": 40,
}
BOTH = {
    "adaptive_input": True,
    "adaptive_input_cutoff": "20,40",
    "adaptive_input_factor": 2.0,
    "adaptive_softmax_cutoff": "20,40",
    "adaptive_softmax_factor": 2.0,
}
CASES = {
    "plain": {},
    "shared": {"share_decoder_input_output_embed": True, "decoder_learned_pos": True},
    "all_tied": BOTH | {"tie_adaptive_weights": True, "tie_adaptive_proj": True},
    "tied_weights": BOTH | {"tie_adaptive_weights": True, "no_decoder_final_norm": True},
    "untied": BOTH | {"tie_adaptive_proj": True},  # without tied weights the projections are not tied either
    "adaptive_input": {
        "adaptive_input": True,
        "adaptive_input_cutoff": [20, VOCAB],
        "adaptive_input_factor": 4,
        "decoder_input_dim": 16,
    },
    "adaptive_softmax": {
        "adaptive_softmax_cutoff": "20",
        "adaptive_softmax_factor": 4,
        "activation_fn": "gelu",
    },
    "adaptive_widths": BOTH | {"decoder_input_dim": 16, "decoder_output_dim": 24},
    "widths": {"decoder_input_dim": 16, "decoder_output_dim": 24, "activation_fn": "gelu_accurate"},
    "shared_widths": {
        "decoder_input_dim": 16,
        "decoder_output_dim": 16,
        "share_decoder_input_output_embed": True,
    },
    "post_norm": {"decoder_normalize_before": False, "layernorm_embedding": True, "activation_fn": "tanh"},
    "bare": {
        "no_token_positional_embeddings": True,
        "no_scale_embedding": True,
        "activation_fn": "linear",
        "decoder_layers_to_keep": "0,2,3",
    },
    "long": {"max_target_positions": 4, "activation_fn": "gelu_fast"},  # sinusoidal positions have no limit
    "squared": {"activation_fn": "relu_squared", "decoder_embed_dim": 36, "decoder_layerdrop": 0.5},
    "quant_noise": {"quant_noise_pq": 0.1, "checkpoint_activations": True},  # fairseq's extra Linear
}


def fairseq_model(options, seed=0):
    """fairseq's model with every parameter moved off its initial value, and its options as a dict."""
    from fairseq.data import Dictionary
    from fairseq.models.transformer_lm import TransformerLanguageModel, base_lm_architecture

    dictionary = Dictionary()
    for i in range(VOCAB - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    args = Namespace(**{**SMALL, **options})
    base_lm_architecture(args)
    args.decoder_normalize_before = options.get("decoder_normalize_before", True)
    torch.manual_seed(seed)
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    chosen = dict(vars(args))  # build_model changes args
    model = TransformerLanguageModel.build_model(args, task).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model, chosen


def our_model(options):
    return TransformerLM(TransformerLMConfig.from_fairseq(options, VOCAB, PAD)).eval()


def batches():
    """A full batch, and one with words missing on the right; with every band and padding in the middle."""
    generator = torch.Generator().manual_seed(1)
    full = torch.randint(4, VOCAB, (3, 17), generator=generator)
    padded = full.clone()
    padded[1, 9:] = PAD
    padded[2, 1:] = PAD
    first_band_only = full % 15 + 4
    return {"full": full, "padded": padded, "one_band": first_band_only, "one_token": full[:, :1]}
