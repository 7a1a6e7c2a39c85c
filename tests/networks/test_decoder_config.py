"""Which of fairseq's options are read, and how; and which are refused."""

import pytest

from fairseq_quant_noise.errors import UserError
from fairseq_quant_noise.networks import TransformerLMConfig
from fairseq_quant_noise.networks.registry import build

VOCAB = 60
SMALL = {"decoder_embed_dim": 32, "decoder_layers": 1, "decoder_attention_heads": 4}
BOTH = {
    "adaptive_input": True,
    "adaptive_input_cutoff": "20,40",
    "adaptive_input_factor": 2.0,
    "adaptive_softmax_cutoff": "20,40",
    "adaptive_softmax_factor": 2.0,
}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("character_embeddings", True),
        ("base_layers", 1),
        ("decoder_xformers_att_config", "{'name': 'linformer'}"),
        ("scale_fc", True),
        ("scale_attn", True),
        ("scale_heads", True),
        ("scale_resids", True),
        ("cross_self_attention", True),
        ("quant_noise_scalar", 0.5),
        ("activation_fn", "swish"),
    ],
)
def test_options_that_are_not_implemented_are_refused(option, value):
    with pytest.raises(UserError, match=f"{option}.*fairseq-eval-lm --user-dir"):
        TransformerLMConfig.from_fairseq({**SMALL, option: value}, VOCAB)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"decoder_attention_heads": 5}, "decoder_attention_heads 5"),
        ({"adaptive_softmax_cutoff": "20,100"}, "adaptive_softmax_cutoff 20,100"),
        ({"adaptive_softmax_cutoff": "20,__import__('os')"}, "adaptive_softmax_cutoff.*integers"),
        ({"adaptive_input": True}, "adaptive_input_cutoff"),
        ({"tie_adaptive_weights": True}, "tie_adaptive_weights"),
        ({**BOTH, "tie_adaptive_weights": True, "adaptive_input_factor": 4}, "tie_adaptive_weights"),
        (
            {**BOTH, "adaptive_softmax_cutoff": None, "share_decoder_input_output_embed": True},
            "share_decoder",
        ),
        ({"max_target_positions": "${task.max_target_positions}"}, "max_target_positions.*resolve"),
        ({"max_target_positions": None, "tokens_per_sample": "${task.x}"}, "max_target_positions.*resolve"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, named):
    with pytest.raises(UserError, match=named):
        TransformerLMConfig.from_fairseq({**SMALL, **options}, VOCAB)


def test_options_are_read_as_fairseq_reads_them():
    read = TransformerLMConfig.from_fairseq
    assert read({"max_target_positions": None, "tokens_per_sample": 77}, VOCAB).max_target_positions == 77
    assert read({"adaptive_softmax_cutoff": 20}, VOCAB).adaptive_softmax_cutoff == (20,)
    assert read({"adaptive_softmax_cutoff": "[20, 40]"}, VOCAB).adaptive_softmax_cutoff == (20, 40)
    assert read({"decoder_layers_to_keep": "0,2"}, VOCAB).decoder_layers == 2
    old = read({"no_tie_adaptive_proj": False}, VOCAB)
    assert old.tie_adaptive_proj
    assert old.no_decoder_final_norm
    assert not read({"decoder_final_norm": True}, VOCAB).no_decoder_final_norm
    assert read({"dropout": 0.1, "unheard_of": 1, "scale_fc": False, "base_layers": 0}, VOCAB, 3).padding_idx == 3


def test_registry():
    noise = {**SMALL, "quant_noise_pq": 0.1, "quant_noise_scalar": 0.5}
    ours = build("quant_noise_transformer_lm_small", noise, VOCAB)
    assert "decoder.quant_noise.weight" not in ours.state_dict()  # our own models add no Linear
    stock = build("transformer_lm_gpt", {**SMALL, "quant_noise_pq": 0.1}, VOCAB)
    assert "decoder.quant_noise.weight" in stock.state_dict()
    with pytest.raises(UserError, match="'fconv_lm'"):
        build("fconv_lm", SMALL, VOCAB)
