"""Centroids in 8 bits: what is read, which gradient comes back, what the file holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import INT_PLANS, TOKENS, ZOO_PLAN, adopting, by_torch, quiet, refuses, zoo

from fairseq_quant_noise import load, save
from fairseq_quant_noise.artifact import pack
from fairseq_quant_noise.layers import PQWeight, adopt_quantized, quantize_weight_, quantized_weights
from fairseq_quant_noise.quantization.quantize import quantize_
from fairseq_quant_noise.scalar import fit_affine
from fairseq_quant_noise.weights.discovery import find_weights

PLAN = INT_PLANS["int8 centroids"]
CODES = torch.tensor([[0, 1], [1, 1]], dtype=torch.uint8)
CENTROIDS = torch.tensor([[0.1, 0.2], [0.3, -0.4], [5.0, 6.0]])


def by_hand(dtype=torch.float32):
    return PQWeight(CODES, CENTROIDS.clone(), (2, 4), 8).to(dtype)


def rounded():
    return by_torch(CENTROIDS, fit_affine("", CENTROIDS, 8, "tensor"))


@pytest.mark.parametrize("training", [True, False])
def test_training_and_evaluation_see_the_rounded_centroids(training):
    weight = by_hand().train(training)
    expected = rounded()[CODES.flatten().long()].view(2, 4)
    assert torch.equal(weight.decode(), expected)
    assert not torch.equal(expected, CENTROIDS[CODES.flatten().long()].view(2, 4))


@pytest.mark.upstream(12)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gradient_goes_to_the_centroids_straight_through(dtype):
    weight = by_hand(dtype).train()
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]], dtype=dtype)
    weight.decode().backward(upstream)
    of_three = torch.tensor([3.0 + 5 + 7, 4 + 6 + 8]) / 3**0.5  # the root of the cluster's size
    expected = torch.stack([torch.tensor([1.0, 2.0]), of_three, torch.zeros(2)]).to(dtype)
    torch.testing.assert_close(weight.centroids.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half(dtype):
    weight = by_hand(dtype)
    assert weight.decode().dtype == weight.eval().decode().dtype == dtype


def test_a_weight_takes_8_bits_a_number_of_its_centroids_and_log2_k_a_block():
    weight = PQWeight(torch.zeros(32, 4, dtype=torch.uint8), torch.randn(16, 8), (32, 32), 8)
    assert weight.paper_bytes == (8 * 16 * 8 + 4 * 32 * 4) / 8
    assert weight.parts()["centroids"].dtype == torch.uint8


def test_a_checkpoint_holds_the_trained_centroids_and_their_bits():
    state, fp16 = (quantize_(zoo(), plan, progress=quiet).state_dict() for plan in (PLAN, ZOO_PLAN))
    assert set(state) - set(fp16) == {f"{name}.weight.centroid_bits" for name in WEIGHTS}
    assert torch.equal(state["fc.weight.centroids"], fp16["fc.weight.centroids"])


WEIGHTS = ["emb", *(f"attn.{p}_proj" for p in ("q", "k", "v", "out")), "fc", "conv", "out"]


def test_the_file_gives_the_same_outputs_and_the_same_file(tmp_path):
    model = quantize_(zoo(), PLAN, progress=quiet).eval()
    save(model, tmp_path / "a")
    loaded = load(tmp_path / "a", into=zoo(1))
    torch.testing.assert_close(loaded(TOKENS), model(TOKENS), rtol=1e-6, atol=1e-7)
    assert all(weight.bits == 8 for weight in quantized_weights(loaded).values())
    again = pack(loaded).tensors
    for name, tensor in pack(model).tensors.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=0)


def test_a_loaded_model_in_half_precision_computes_as_the_saved_one_would(tmp_path):
    model = quantize_(zoo(), PLAN, progress=quiet).eval()
    save(model, tmp_path / "a")
    loaded = load(tmp_path / "a", into=zoo(1)).half()
    torch.testing.assert_close(loaded.fc.weight, model.fc.weight.half(), rtol=2e-3, atol=1e-3)


def test_a_loaded_model_can_be_fine_tuned(tmp_path):
    save(quantize_(zoo(), PLAN, progress=quiet), tmp_path / "a")
    loaded = load(tmp_path / "a", into=zoo(1)).train()
    weight = loaded.fc._modules["weight"]
    with torch.no_grad():
        weight.centroids.mul_(1.7)
    expected = by_torch(weight.centroids.detach(), fit_affine("", weight.centroids, 8, "tensor"))
    assert torch.equal(weight.eval().stored_centroids(), expected)


@given(st.lists(st.integers(-64, 64), min_size=8, max_size=8), st.sampled_from([0.25, 1 / 3, 2.0]))
@settings(max_examples=60, deadline=None)
def test_any_centroids_come_back_from_the_file_as_evaluation_saw_them(numbers, unit):
    """Also such whose ends fall between two codes."""
    linear = nn.Linear(4, 2, bias=False)
    model = nn.ModuleDict({"m": linear}).eval()
    codes = torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8)
    quantize_weight_(find_weights(model)[0], codes, torch.tensor(numbers).view(4, 2) * unit, 8)
    found = adopting(nn.ModuleDict({"m": nn.Linear(4, 2, bias=False)}), pack(model).state_dict()).eval()
    torch.testing.assert_close(found["m"].weight, linear.weight, rtol=1e-6, atol=1e-6)


def test_centroids_whose_ends_fall_between_two_codes_come_back_as_evaluation_saw_them():
    model = nn.ModuleDict({"m": nn.Linear(4, 2, bias=False)}).eval()
    codes = torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8)
    centroids = torch.tensor([[-0.5, 254.5], [100.0, 7.0], [128.0, 200.0], [1.0, 0.0]])  # scale 1
    quantize_weight_(find_weights(model)[0], codes, centroids, 8)
    found = adopting(nn.ModuleDict({"m": nn.Linear(4, 2, bias=False)}), pack(model).state_dict()).eval()
    torch.testing.assert_close(found["m"].weight, model["m"].weight, rtol=1e-6, atol=1e-6)


def test_centroids_that_diverged_are_refused_in_one_line():
    weight = by_hand().eval()
    weight.centroids.data[0, 0] = float("nan")
    with refuses("NaN or infinity"):
        weight.decode()


def test_a_state_with_fp16_centroids_is_not_taken_for_int8_ones():
    source = quantize_(zoo(), ZOO_PLAN, progress=quiet)
    target = zoo(1)
    adopt_quantized(target, source.state_dict())
    assert all(weight.bits == 16 for weight in quantized_weights(target).values())
