"""A Transformer layer in inference mode writes over what it has just computed, and nothing else."""

import pytest
import torch

from fairseq_quant_noise.networks.attention import ACTIVATIONS, TransformerLayer, activate

MODES = {"inference mode": torch.inference_mode, "no_grad": torch.no_grad}


@pytest.mark.parametrize("normalize_before", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_results_are_the_same_in_every_mode(activation, normalize_before):
    layer, x = TransformerLayer(16, 32, 2, activation, normalize_before).eval(), torch.randn(2, 5, 16)
    expected, kept = layer(x), x.clone()
    for mode in MODES.values():
        with mode():
            assert torch.equal(layer(x), expected)
    with torch.inference_mode():
        assert torch.equal(layer(x.clone()), expected)  # x itself belongs to inference mode
    assert torch.equal(x, kept)


def test_only_inference_mode_spends_what_it_is_given():
    for name, mode in MODES.items():
        with mode():
            x = torch.randn(3)
            kept = x.clone()
            assert torch.equal(activate(x, "gelu"), torch.nn.functional.gelu(kept))
            assert torch.equal(x, kept) == (name == "no_grad")


def test_a_sum_keeps_the_wider_type():
    layer = TransformerLayer(16, 32, 2, "gelu", normalize_before=True).eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 5, 16)).dtype == torch.float32
