"""A model with noise: which weights are noised, which blocks, and what never changes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import TOKENS, Attention, Read, Zoo, hits, noised, refuses, stored, weight_of, zoo

from fairseq_quant_noise.noise import attach_rules, detach_noise
from fairseq_quant_noise.plan.rules import NoiseRule


def share_of_hits(model):
    return float(hits(weight_of(model), 4).float().mean())


# What never changes


@pytest.mark.upstream(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_training_forwards_leave_every_stored_weight_bit_identical(dtype):
    model = noised(zoo().to(dtype), p=0.1, block_size=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(100):
        model(TOKENS).sum().backward()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_names_and_tensors_of_the_model_are_those_without_noise():
    model = zoo()
    parameters, state = dict(model.named_parameters()), model.state_dict()
    noised(model, block_size=1)
    model(TOKENS)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert list(dict(model.named_modules())) == list(dict(zoo().named_modules()))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_outside_a_forward_the_weight_is_the_stored_parameter():
    model = noised(Zoo(), block_size=1)
    model(TOKENS)
    assert model.fc.weight is stored(model.fc)
    assert model.out.weight is model.emb.weight


def test_eval_mode_gives_the_noise_free_model():
    model = zoo()
    expected = model.eval()(TOKENS)
    noised(model, block_size=1)
    assert not torch.equal(model(TOKENS), expected)
    model.eval()
    assert torch.equal(model(TOKENS), expected)
    assert torch.equal(model(TOKENS), expected)


# Which blocks


def test_the_share_of_blocks_hit_is_p_and_the_rest_is_not_rescaled():
    model = noised(nn.Linear(256, 512, bias=False), p=0.1, block_size=8)
    seen, n = weight_of(model), 256 * 512 // 8
    hit = hits(seen, 8)
    assert abs(int(hit.sum()) - 0.1 * n) < 5 * math.sqrt(n * 0.1 * 0.9)
    assert torch.equal(seen.reshape(-1, 8)[~hit], stored(model).reshape(-1, 8)[~hit])
    assert seen.count_nonzero() == 8 * int((~hit).sum())  # no block is hit in part


@pytest.mark.parametrize(("p", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_p_0_hits_nothing_and_p_1_everything(p, share):
    assert share_of_hits(noised(nn.Linear(16, 16, bias=False), p=p)) == share


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_the_gradient_goes_straight_through_to_the_stored_weight(p):
    """y = x W~^T: the gradient of W is G^T x in every block, the zeroed ones too."""
    model = noised(nn.Linear(8, 6, bias=False), p=p)
    x, upstream = torch.randn(5, 8, requires_grad=True), torch.randn(5, 6)
    y = model(x)
    y.backward(upstream)
    torch.testing.assert_close(stored(model).grad, upstream.t() @ x.detach())
    assert not torch.allclose(y, F.linear(x, stored(model)))


def test_rules_on_one_weight_are_applied_one_after_the_other():
    model = nn.Linear(256, 256, bias=False).train()
    attach_rules(model, [NoiseRule(".*", 0.5, block_size=4), NoiseRule(".*", 0.5, block_size=4)])
    assert 0.72 < share_of_hits(model) < 0.78  # 1 - (1 - p)^2, each rule with its own J


def test_weights_that_no_rule_matches_have_no_noise():
    model = noised(zoo(), match="fc", p=1.0)
    assert type(model.conv) is nn.Conv2d
    seen = Read(model.conv).train()()
    assert seen is stored(model.conv)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_stay_half(dtype):
    model = noised(Read(nn.Linear(8, 8).to(dtype)))
    assert model().dtype == dtype
    assert hits(model(), 4).any()


def test_under_autocast_each_forward_has_its_own_noise():
    model = noised(nn.Linear(64, 64, bias=False))
    with torch.autocast("cpu", torch.bfloat16):
        first, second = weight_of(model), weight_of(model)
    assert first.dtype == torch.bfloat16
    assert not torch.equal(hits(first, 4), hits(second, 4))


# Which modules


@pytest.mark.upstream(2)
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "out_proj"])
def test_weights_that_attention_hands_to_a_functional_get_noise(name):
    torch.manual_seed(0)
    model = Attention()
    x = torch.randn(5, 2, 8)
    expected = model(x)
    noised(model, match=name)
    assert not torch.allclose(model(x), expected)


@pytest.mark.upstream(2)
def test_torchs_own_attention_gets_noise_where_it_holds_a_linear():
    model = nn.MultiheadAttention(8, 2)
    x = torch.randn(5, 2, 8)
    expected = model(x, x, x)[0]
    noised(model, match="out_proj", p=1.0)
    assert not torch.allclose(model(x, x, x)[0], expected)


@pytest.mark.upstream(3)
def test_embeddings_get_noise():
    model = noised(nn.Embedding(12, 8, padding_idx=1))
    hit = hits(model(torch.arange(12)), 4)
    assert 0 < hit.float().mean() < 1
    assert list(model.state_dict()) == ["weight"]  # and no extra layer is added


@pytest.mark.upstream(18)
@pytest.mark.parametrize(
    ("conv", "block_size"),
    [
        (nn.Conv2d(8, 6, 1), 4),
        (nn.Conv2d(4, 6, 3), 9),
        (nn.Conv2d(4, 6, 3), 18),
        (nn.Conv2d(6, 6, 3, groups=6), 9),
        (nn.Conv2d(6, 6, 5, groups=6), 5),
    ],
)
def test_convolutions_get_noise(conv, block_size):
    x = torch.randn(2, conv.in_channels, 6, 6)
    model = noised(ConvTwice(conv), block_size=block_size)
    y, seen = model(x)
    assert seen.shape == stored(conv).shape
    assert 0 < hits(seen, block_size).float().mean() < 1
    torch.testing.assert_close(y, F.conv2d(x, seen, conv.bias, groups=conv.groups))


class ConvTwice(nn.Module):
    """A convolution's output, and the weight that the same forward sees."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x), self.conv.weight


# Copies, and taking the noise off


def test_a_deepcopy_has_noise_of_its_own():
    model = noised(Zoo(), block_size=1)
    twin = copy.deepcopy(model)
    assert twin._quant_noise.root is twin
    assert twin.out.weight is twin.emb.weight is not model.emb.weight
    seed = model._quant_noise.seed
    twin(TOKENS)
    assert model._quant_noise.seed == seed
    detach_noise(twin)
    assert type(twin.fc) is nn.Linear
    assert torch.equal(twin(TOKENS), twin(TOKENS))
    assert not torch.equal(model(TOKENS), model(TOKENS))


def test_detach_restores_everything():
    model = zoo()
    before = {name: (type(m), set(vars(m))) for name, m in model.named_modules()}
    expected = model(TOKENS)
    detach_noise(noised(model, block_size=1))
    assert {name: (type(m), set(vars(m))) for name, m in model.named_modules()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(TOKENS), expected)


def test_detach_without_noise_changes_nothing_and_noise_can_come_back():
    model = zoo()
    detach_noise(model)
    detach_noise(noised(model, block_size=1))
    assert hits(noised(Read(model.fc))(), 4).any()


def test_a_noised_module_prints_and_tests_as_its_own_type():
    model = noised(zoo(), block_size=1)
    assert isinstance(model.fc, nn.Linear)
    assert repr(model) == repr(zoo())


# Mistakes


def test_attaching_twice_is_refused():
    model = noised(zoo(), block_size=1)
    with refuses("has noise already"):
        noised(model, block_size=1)


def test_attaching_to_a_part_of_a_noised_model_is_refused():
    model = noised(zoo(), block_size=1)
    with refuses("has noise already"):
        noised(model.attn)


def test_attaching_to_a_model_with_a_noised_part_is_refused():
    model = zoo()
    noised(model.attn)
    with refuses("has noise already"):
        noised(model, block_size=1)


def test_a_rule_that_matches_nothing_is_refused_by_its_name():
    with refuses(r"noise rule 'decoder\.fc9' matches no weight.*emb.*conv"):
        noised(zoo(), match="decoder.fc9")


def test_a_block_size_that_does_not_divide_is_refused_with_the_tensor_and_the_sizes_that_fit():
    with refuses(r"^fc: blocks of 3 .* \(8, 8\).* 1, 2, 4, 8 for it"):
        noised(zoo(), block_size=3, match="fc")


def test_after_a_refusal_the_model_is_as_it_was():
    model = zoo()
    with refuses("conv: blocks of 4"):
        attach_rules(model, [NoiseRule("fc", 0.5), NoiseRule("conv", 0.5, block_size=4)])
    assert type(model.fc) is nn.Linear
    noised(model, match="fc")


def convolutions():
    return nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))


def test_proxy_noise_on_convolutions_is_warned_of_with_their_share_and_the_cure(caplog):
    attach_rules(convolutions(), [NoiseRule("0", 0.1, block_size=9), NoiseRule("3", 0.1, block_size=8)])
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "90% of the noised weights; 0 is the first" in said  # 288 of 320
    assert "--quant-noise-kind pq" in said


@pytest.mark.parametrize(
    "rules",
    [
        [NoiseRule("0", 0.1, "pq", 9), NoiseRule("3", 0.1, "proxy", 8)],
        [NoiseRule(".*", 0.1, "mean", 1)],
        [NoiseRule(".*", 0.0, "proxy", 1)],
    ],
    ids=["of a Linear alone", "another kind", "never"],
)
def test_other_noise_on_a_network_of_convolutions_is_not_warned_of(rules, caplog):
    attach_rules(convolutions(), rules)
    assert not caplog.records
