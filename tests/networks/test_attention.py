"""A Transformer layer in inference mode writes over what it has just computed, and nothing else."""

import pytest
import torch

from fairseq_quant_noise.networks.attention import ACTIVATIONS, TransformerLayer, activate, causal_mask

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


def test_torch_compile_and_export_take_a_masked_layer_as_one_graph():
    layer, x = TransformerLayer(16, 32, 2, "gelu", normalize_before=False).eval(), torch.randn(2, 3, 16)
    mask = causal_mask(torch.tensor([[False, False, False], [False, True, True]]))
    expected = layer(x, mask)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, mask), expected)
    torch.testing.assert_close(torch.export.export(layer, (x, mask)).module()(x, mask), expected)


def test_a_causal_mask_hides_later_words_and_padding():
    mask = causal_mask(torch.tensor([[False, False, False], [False, False, True]]))
    assert mask[:, 0].int().tolist() == [[[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 0]]]
    assert causal_mask(torch.zeros(2, 3, dtype=torch.bool)) is None
