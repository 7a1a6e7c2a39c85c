"""A weight held as codes and centroids: what is read, which gradient comes back, how states load."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import INT_PLANS, TOKENS, ZOO_PLAN, Tied, quiet, refuses, zoo

from fairseq_quant_noise.layers import PQWeight, adopt_quantized, quantize_weight_, quantized_weights
from fairseq_quant_noise.quantization.quantize import quantize_
from fairseq_quant_noise.weights.discovery import find_weights

CODES = torch.tensor([[0, 1], [1, 1]], dtype=torch.uint8)
CENTROIDS = torch.tensor([[0.1, 0.2], [0.3, -0.4], [5.0, 6.0]])
DENSE = torch.tensor([[0.1, 0.2, 0.3, -0.4], [0.3, -0.4, 0.3, -0.4]])


def by_hand(shape=(2, 4)):
    return PQWeight(CODES, CENTROIDS.clone(), shape)


def quantize(module, d=4, k=3):
    """`module` with random codes, as a model of its own."""
    model = nn.ModuleDict({"m": module})
    weight = find_weights(model)[0]
    codes = torch.randint(k, (weight.shape[0], math.prod(weight.shape[1:]) // d), dtype=torch.uint8)
    return quantize_weight_(weight, codes, torch.randn(k, d))


# What is read


def test_decoding_is_centroids_at_codes():
    weight = by_hand().train()
    assert torch.equal(weight.decode(), DENSE)
    assert torch.equal(weight.decode().view(4, 2), weight.centroids[CODES.flatten().long()])
    assert (weight.block_size, weight.n_centroids) == (2, 3)


def test_evaluation_uses_the_centroids_as_the_file_holds_them():
    weight = by_hand().eval()
    assert torch.equal(weight.decode(), DENSE.half().float())
    assert not torch.equal(weight.decode(), DENSE)
    assert torch.equal(weight.stored_centroids(), CENTROIDS.half().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half(dtype):
    weight = by_hand().to(dtype)
    assert weight.decode().dtype == weight.eval().decode().dtype == dtype
    assert weight.codes.dtype == torch.uint8


def test_a_weight_of_256_centroids_uses_them_all():
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    weight = PQWeight(codes, torch.arange(256.0).unsqueeze(1), (16, 16))
    assert torch.equal(weight.decode().flatten(), torch.arange(256.0))


# Its gradient


@pytest.mark.upstream(12)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gradient_of_a_centroid_is_the_sum_over_the_root_of_its_blocks(dtype):
    weight = by_hand().to(dtype)
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]], dtype=dtype)
    weight.decode().backward(upstream)
    expected = [[1.0, 2.0], [(3 + 5 + 7) / 3**0.5, (4 + 6 + 8) / 3**0.5], [0.0, 0.0]]  # no block uses the third
    torch.testing.assert_close(weight.centroids.grad, torch.tensor(expected, dtype=dtype))


@pytest.mark.upstream(12)
@pytest.mark.parametrize("module", [nn.Linear(4, 6), nn.Embedding(6, 4), nn.Conv2d(4, 6, 1)], ids=lambda m: str(m))
def test_every_module_type_scales_alike(module):
    weight = quantize(module, k=1).train()
    module.weight.sum().backward()
    torch.testing.assert_close(weight.centroids.grad, torch.full((1, 4), 6**0.5))


def test_a_sum_over_more_blocks_than_fp16_can_count_does_not_overflow():
    weight = PQWeight(torch.zeros(70_000, 1, dtype=torch.uint8), torch.zeros(1, 1).half(), (70_000, 1))
    weight.decode().backward(torch.ones(70_000, 1).half())
    assert weight.centroids.grad.item() == torch.tensor(70_000.0).sqrt().half().item()


# In a module


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_computes_with_the_decoded_weight(bias):
    linear = nn.Linear(8, 6, bias=bias)
    weight, x = quantize(linear), torch.randn(2, 8)
    assert torch.equal(linear(x), F.linear(x, weight.decode(), linear.bias))
    assert isinstance(linear, nn.Linear)


@pytest.mark.parametrize(("conv", "d"), [(nn.Conv2d(8, 6, 1), 4), (nn.Conv2d(4, 4, 3, groups=4), 9)])
def test_a_convolution_computes_with_the_decoded_weight(conv, d):
    weight, x = quantize(conv, d), torch.randn(2, conv.in_channels, 5, 5)
    assert weight.decode().shape == (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
    assert torch.equal(conv(x), F.conv2d(x, weight.decode(), conv.bias, groups=conv.groups))


@pytest.mark.upstream(19)
def test_an_embedding_keeps_its_padding_word_without_a_gradient():
    """The padding word's block is the only one of its centroid, so that centroid gets no gradient."""
    embedding = nn.Embedding(3, 2, padding_idx=1)
    model = nn.ModuleDict({"m": embedding})
    codes = torch.tensor([[0], [1], [0]], dtype=torch.uint8)
    weight = quantize_weight_(find_weights(model)[0], codes, torch.randn(2, 2))
    embedding(torch.tensor([0, 1, 1, 2])).sum().backward()
    assert embedding.padding_idx == 1
    torch.testing.assert_close(weight.centroids.grad, torch.tensor([[2**0.5] * 2, [0.0, 0.0]]))


def test_the_mode_of_the_module_is_the_mode_of_its_weight():
    linear = nn.Linear(8, 6).eval()
    assert not quantize(linear).training


def test_attention_that_hands_its_weights_to_a_functional_computes_with_codes():
    model = zoo()
    before = model(TOKENS)
    quantize_(model, {"stages": [{"match": r"attn\.q_proj", "block_size": 4}]}, progress=quiet)
    assert not torch.equal(model(TOKENS), before)


def test_a_copy_is_independent_and_keeps_its_ties():
    model = quantize_(Tied(), {"stages": [{"match": "emb", "block_size": 4}]}, progress=quiet)
    twin = copy.deepcopy(model)
    assert twin.emb._modules["weight"] is twin.out._modules["weight"]
    twin.emb._modules["weight"].centroids.data.zero_()
    assert model.emb.weight.any()


# Ties


@pytest.fixture
def tied():
    model = Tied()
    quantize_weight_(find_weights(model)[0], torch.randint(3, (12, 2), dtype=torch.uint8), torch.randn(3, 4))
    return model


@pytest.mark.upstream(8)
def test_ties_stay_tied_and_are_counted_once(tied):
    assert tied.emb._modules["weight"] is tied.out._modules["weight"]
    assert set(tied.state_dict()) == {f"{m}.weight.{part}" for m in ("emb", "out") for part in ("codes", "centroids")}
    assert [p.shape for p in tied.parameters()] == [(3, 4)]
    assert list(quantized_weights(tied)) == ["emb"]


@pytest.mark.upstream(8)
def test_a_centroid_of_a_tied_weight_gets_the_mean_of_each_use_added(tied):
    tied.train()
    tied.emb.weight.sum().backward()
    once = tied.emb._modules["weight"].centroids.grad.clone()
    tied.zero_grad()
    (tied.emb.weight.sum() + tied.out.weight.sum()).backward()
    assert torch.equal(tied.emb._modules["weight"].centroids.grad, 2 * once)


def test_quantizing_twice_is_refused(tied):
    with refuses("emb is quantized already; a plan may quantize a weight once"):
        quantize_weight_(find_weights(tied)[0], torch.zeros(12, 2, dtype=torch.uint8), torch.randn(3, 4))


# States


@pytest.mark.parametrize("plan", {"pq": ZOO_PLAN, **INT_PLANS}.values(), ids=["pq", *INT_PLANS])
def test_a_dense_model_adopts_a_quantized_state(plan):
    source, target = quantize_(zoo(0), plan, progress=quiet), zoo(1)
    changed = adopt_quantized(target, source.state_dict())
    assert changed == list(quantized_weights(source))
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.eval()(TOKENS), source.eval()(TOKENS))
    assert target.emb._modules["weight"] is target.out._modules["weight"]
    assert adopt_quantized(target, source.state_dict()) == []


def test_a_dense_state_changes_nothing():
    model = zoo()
    assert adopt_quantized(model, zoo(1).state_dict()) == []
    assert not quantized_weights(model)


def test_a_model_that_is_one_layer_adopts_its_state():
    source = quantize_(nn.Linear(8, 64), {"stages": [{"match": ".*", "block_size": 4}]}, progress=quiet)
    target = nn.Linear(8, 64)
    adopt_quantized(target, source.state_dict())
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.weight, source.weight)


MISFITS = {
    "of another architecture": ((6, 3), (3, 4)),
    "of more rows": ((7, 2), (3, 4)),
    "of other blocks": ((6, 2), (3, 2)),
    "of blocks that do not tile the row": ((6, 2), (3, 3)),
    "without blocks": ((6, 2), (3,)),
}


@pytest.mark.parametrize("name", MISFITS)
def test_codes_that_do_not_fit_are_refused_by_name(name):
    codes, centroids = MISFITS[name]
    state = {"m.weight.codes": torch.zeros(codes, dtype=torch.uint8), "m.weight.centroids": torch.zeros(centroids)}
    with refuses(r"^m: codes of shape .* do not fit a weight of shape \(6, 8\)"):
        adopt_quantized(nn.ModuleDict({"m": nn.Linear(8, 6)}), state)
