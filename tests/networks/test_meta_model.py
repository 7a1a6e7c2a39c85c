"""Networks by name, on the meta device."""

import pytest
import torch
from toys import python

from fairseq_quant_noise.networks.registry import build, meta_model

OPTIONS = {
    "transformer_lm": {"decoder_layers": 1, "decoder_embed_dim": 8, "decoder_ffn_embed_dim": 8},
    "roberta": {"encoder_layers": 1, "encoder_embed_dim": 8, "encoder_ffn_embed_dim": 8, "encoder_attention_heads": 2},
    "transformer": {"encoder_layers": 1, "decoder_layers": 1, "encoder_embed_dim": 8, "decoder_embed_dim": 8},
}
HEADS = {"decoder_attention_heads": 2, "encoder_attention_heads": 2, "max_positions": 16}


@pytest.mark.parametrize("model", OPTIONS)
def test_a_network_without_memory_is_built_without_torchs_compiler(model):
    """torch imports it to fill weights on the meta device with numbers, which takes longer than to import torch."""
    code = (
        "import sys\n"
        "from fairseq_quant_noise.networks.registry import meta_model\n"
        f"model = meta_model('quant_noise_{model}', {OPTIONS[model] | HEADS}, 20)\n"
        "print(all(p.is_meta for p in model.parameters()), 'torch._dynamo' in sys.modules)\n"
    )
    ran = python("-c", code)
    assert ran.stdout == "True False\n", ran.stderr


def test_it_has_the_tensors_of_the_network_in_memory():
    options = OPTIONS["roberta"] | HEADS
    held, built = (make("quant_noise_roberta", options, 20) for make in (meta_model, build))
    assert {n: t.shape for n, t in held.state_dict().items()} == {n: t.shape for n, t in built.state_dict().items()}
    assert any(bool(torch.any(p)) for p in built.parameters()), "outside of meta_model weights are drawn"
