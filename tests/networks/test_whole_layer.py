"""A layer of an encoder in one call: the numbers of its modules, and the modules themselves where they are needed."""

import copy
import pickle

import pytest
import torch
from torch import nn
from whole_layers import SCHEMES, assert_same_layers, both_ways, by_modules, from_file, layer_of

from fairseq_quant_noise import load, quantize_, save
from fairseq_quant_noise.kernels import cpu
from fairseq_quant_noise.layers.products import product_of
from fairseq_quant_noise.layers.quantized import quantized_weights
from fairseq_quant_noise.networks import Roberta, RobertaConfig, attention
from fairseq_quant_noise.networks.attention import TransformerLayer

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="there is no compiler here")


@pytest.fixture
def calls(monkeypatch):
    """Whether each call of a layer was done at once."""
    found, original = [], attention.whole_layer

    def recorded(*arguments):
        result = original(*arguments)
        found.append(result is not None)
        return result

    monkeypatch.setattr(attention, "whole_layer", recorded)
    return found


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return request.param


def test_one_call_computes_what_the_modules_do(scheme, calls):
    with torch.no_grad():
        for name, found, expected in both_ways(scheme):
            assert_same_layers(found, expected), name
    assert calls == [True] * 10


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_large_and_small_numbers(activation, calls):
    layer = layer_of("int8", activation=activation)
    layer.fc1.bias.data.copy_(torch.linspace(-40, 40, 128))
    with torch.inference_mode():
        for scale in (1e-3, 1.0, 1e3):
            x = scale * torch.randn(2, 9, 64)
            assert_same_layers(layer(x), by_modules(layer, x))
    assert all(calls)


def test_a_token_whose_keys_are_all_padding_attends_to_nothing(calls):
    layer, x = layer_of("int8"), torch.randn(2, 5, 64)
    mask = torch.tensor([True, False]).view(2, 1, 1, 1).expand(2, 1, 1, 5).contiguous()
    with torch.no_grad():
        assert_same_layers(layer(x, mask), by_modules(layer, x, mask))
    assert calls == [True]


def test_a_row_that_is_not_finite_spoils_its_sequence_alone(scheme):
    layer, x = layer_of(scheme), torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = layer(x)
        x[0, 2, 3] = torch.nan
        found = layer(x)
    assert found[0].isnan().all()
    assert torch.equal(found[1], expected[1])


def test_threads_change_nothing_in_a_layer(scheme):
    layer, x, before = layer_of(scheme, heads=1), torch.randn(1, 150, 64), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.no_grad():
                found.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_large_batch_goes_in_parts(calls):
    layer, x = layer_of("iPQ + int8"), torch.randn(9, 130, 64)
    mask = torch.ones(9, 1, 1, 130, dtype=torch.bool)
    mask[5:, ..., 100:] = False
    with torch.no_grad():
        alone = [layer(row, seen) for row, seen in zip(x.split(1), mask.split(1), strict=True)]
        assert torch.equal(layer(x, mask), torch.cat(alone))
    assert all(calls)


@pytest.mark.parametrize("change", ["centroids", "codes", "bias", "norm", "another weight"])
def test_what_changes_in_the_layer_counts_at_the_next_call(change, calls):
    layer, x = layer_of("iPQ + int8"), torch.randn(1, 6, 64)
    with torch.no_grad():
        before = layer(x)
        weight = quantized_weights(layer)["fc1"]
        if change == "centroids":
            weight.centroids.data.mul_(-1.5)  # as an optimizer does, which no version counts
        elif change == "codes":
            weight.codes = weight.codes.flip(0).t().contiguous().t()
        elif change == "bias":
            layer.fc1.bias = nn.Parameter(torch.randn(128))
        elif change == "norm":
            layer.final_layer_norm.weight.data = torch.randn(64)
        else:
            layer.fc1 = layer_of("int8", activation="relu").fc1
        after = layer(x)
        assert_same_layers(after, by_modules(layer, x))
    assert not torch.allclose(before, after, atol=1e-2)
    assert calls == [True, True]


def test_a_bias_that_lies_elsewhere_from_the_same_start_is_not_taken_for_the_old_one(scheme):
    layer, x, numbers = layer_of(scheme), torch.randn(1, 6, 64), torch.randn(256)
    with torch.no_grad():
        layer.fc1.bias.data = numbers[:128]
        layer(x)
        layer.fc1.bias.data = numbers[::2]
        assert_same_layers(layer(x), by_modules(layer, x))


def test_a_description_keeps_what_it_points_to(calls):
    """The grid too, which of a layer that was loaded in inference mode was a new one at each call."""
    layer, empty = (TransformerLayer(64, 128, 4, "gelu", False, causal=False).eval() for _ in range(2))
    with torch.inference_mode():
        layer = from_file(layer, empty, {**SCHEMES["int8"], "activations": {"bits": 8}}, [torch.randn(2, 5, 64)])
        grid = layer.fc1.input_quantizer.grid
        first, x = grid(torch.randn(1)), torch.randn(1, 6, 64)
        assert grid(torch.randn(1)) is first
        described = product_of(layer.fc1)
        assert described is not None
        held = {tensor.data_ptr() for tensor in described[2]}
        weight = quantized_weights(layer)["fc1"]
        assert held == {t.data_ptr() for t in (weight.codes, weight.affine, layer.fc1.bias, grid(x))}
        layer.fc1.input_quantizer.range.mul_(2)
        assert grid(torch.randn(1)) is not first
        assert_same_layers(layer(x), by_modules(layer, x))
    assert calls[-1]


def test_a_copy_knows_nothing_of_the_memory_of_the_first(scheme, calls):
    layer, x = layer_of(scheme), torch.randn(1, 6, 64)
    with torch.no_grad():
        expected = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert all("_product" not in w.__dict__ or w._product is None for w in quantized_weights(other).values())
            assert torch.equal(other(x), expected)
    assert all(calls)


def test_a_weight_that_two_modules_hold_changes_for_both(calls):
    layer, x = layer_of("iPQ + int8"), torch.randn(1, 6, 64)
    weight = layer.self_attn.q_proj._modules["weight"]
    layer.self_attn.k_proj._modules["weight"] = weight
    with torch.no_grad():
        for _ in range(3):
            assert_same_layers(layer(x), by_modules(layer, x))
            weight.centroids.data.mul_(-1.2)
    assert all(calls)


def test_a_row_of_a_weight_too_long_for_32_bits_is_left_to_the_modules(monkeypatch, calls):
    monkeypatch.setattr("fairseq_quant_noise.layers.products.LONGEST", 100)
    layer, x = layer_of("int8"), torch.randn(1, 6, 64)  # fc2 has rows of 128
    with torch.no_grad():
        layer(x)
    assert calls == [False]


def hooked(layer):
    layer.fc2.register_forward_hook(lambda module, inputs, output: 2 * output)


def hooked_before(layer):
    layer.self_attn.q_proj.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def hooked_norm(layer):
    layer.final_layer_norm.register_forward_hook(lambda module, inputs, output: 2 * output)


def hooked_attention(layer):
    layer.self_attn.register_forward_hook(lambda module, inputs, output: 2 * output)


def replaced(layer):
    layer.self_attn.v_proj = nn.Sequential(layer.self_attn.v_proj, nn.Tanh())


def dense(layer):
    layer.fc1 = nn.Linear(64, 128)


def with_adapter(layer):
    forward = layer.fc1.forward
    layer.fc1.forward = lambda x: forward(x) + 1


def of_another_kind(layer):
    layer.activation_fn = "tanh"


def training(layer):
    layer.fc1.train()


CHANGES = (
    *(hooked, hooked_before, hooked_norm, hooked_attention, replaced, dense, with_adapter, of_another_kind, training),
)


@pytest.mark.parametrize("change", CHANGES)
def test_modules_are_called_where_they_do_more_than_the_layer_knows(change, calls):
    layer, x = layer_of("int8"), torch.randn(1, 6, 64)
    change(layer)
    with torch.no_grad():
        assert torch.equal(layer(x), by_modules(layer, x))
    assert not any(calls)


def test_gradients_and_autocast_need_the_modules(calls):
    layer, x = layer_of("int8"), torch.randn(1, 6, 64)
    assert layer(x).requires_grad
    with torch.no_grad(), torch.autocast("cpu"):
        layer(x)
    assert calls == [False, False]


@pytest.mark.parametrize("calibrated", [True, False])
def test_calibrated_inputs_are_rounded_on_their_own_ranges(scheme, calibrated, calls):
    data, plan = [torch.randn(2, 6, 64)], SCHEMES[scheme] | {"activations": {"bits": 8}}
    layers = (TransformerLayer(64, 128, 4, "gelu", False, causal=False).eval() for _ in range(2))
    layer = from_file(*layers, plan, data)
    layer.self_attn.k_proj.input_quantizer.range.mul_(0.5)
    if not calibrated:
        layer.fc2.input_quantizer.reset()
    calls.clear()
    with torch.no_grad():
        assert_same_layers(layer(data[0]), by_modules(layer, data[0]))
    assert calls == [calibrated]


def test_a_packed_roberta_runs_its_layers_at_once(scheme, tmp_path, calls):
    config = RobertaConfig(
        vocab_size=50, encoder_layers=2, encoder_embed_dim=32, encoder_ffn_embed_dim=64, encoder_attention_heads=4
    )
    model = Roberta(config).eval()
    quantize_(model, {**SCHEMES[scheme], "stages": [SCHEMES[scheme]["stages"][0] | {"match": r".*layers\..*"}]})
    save(model, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors", into=Roberta(config)).eval()
    tokens = torch.randint(4, 50, (3, 9))
    tokens[1, 5:] = 1
    with torch.inference_mode():
        loaded(tokens)
    assert calls == [True, True]
