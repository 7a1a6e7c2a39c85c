"""A model with noise: which reads are noised, when J is drawn anew, and what never changes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import TOKENS, Attention, Read, Tied, Zoo, hits, noised, refuses, stored, zoo

from fairseq_quant_noise.noise import attach_rules, detach_noise
from fairseq_quant_noise.plan import NoiseRule

WORDS = torch.arange(12)


def weight_of(linear):
    """The weight that calling a Linear without bias applies."""
    return linear(torch.eye(linear.in_features)).t()


def block_is_used(model):
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


def test_an_optimizer_moves_the_stored_weight_by_the_gradient_in_the_hit_blocks_too():
    model = noised(nn.Linear(8, 8, bias=False), p=1.0)
    before = stored(model).detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(stored(model), before - 1)


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
    assert block_is_used(noised(nn.Linear(16, 16, bias=False), p=p)) == share


def test_the_gradient_is_straight_through():
    """y = x W~^T: the gradient of W is G^T x in every block, that of x is G W~."""
    model = noised(nn.Linear(8, 6, bias=False))
    x, upstream = torch.randn(5, 8, requires_grad=True), torch.randn(5, 6)
    y = model(x)
    y.backward(upstream)
    torch.testing.assert_close(stored(model).grad, upstream.t() @ x.detach())
    assert not torch.allclose(y, F.linear(x, stored(model)))


def test_rules_on_one_weight_are_applied_one_after_the_other():
    model = nn.Linear(256, 256, bias=False).train()
    attach_rules(model, [NoiseRule(".*", 0.5, block_size=4), NoiseRule(".*", 0.5, block_size=4)])
    assert 0.72 < block_is_used(model) < 0.78  # 1 - (1 - p)^2, each rule with its own J


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
    hit = hits(model(WORDS), 4)
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


# When J is drawn anew


def test_each_forward_draws_anew():
    model = noised(nn.Linear(64, 64, bias=False))
    assert not torch.equal(hits(weight_of(model), 4), hits(weight_of(model), 4))


def test_each_weight_has_its_own_noise():
    model = noised(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    model(torch.randn(1, 64))
    assert not torch.equal(hits(weight_of_part(model[0]), 4), hits(weight_of_part(model[1]), 4))


def weight_of_part(linear):
    """The weight that calling a Linear with a bias applies; a call of a part keeps the noise of the last draw."""
    return (linear(torch.eye(linear.in_features)) - linear.bias).t().round(decimals=5)


def test_the_same_seed_gives_the_same_noise():
    model = noised(nn.Linear(64, 64, bias=False))
    draws = [torch.manual_seed(s) and weight_of(model) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_noise_of_a_layer_does_not_depend_on_which_other_layers_run():
    """LayerDrop skips layers; the others' noise stays what the seed says."""

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, skip):
            return self.b.weight if skip else (self.a.weight, self.b.weight)[1]

    model = noised(Skip())
    draws = [torch.manual_seed(5) and model(skip) for skip in (True, False)]
    assert torch.equal(*draws)


def test_a_tied_weight_has_one_noise_in_both_uses_of_a_forward():
    class Both(Tied):
        def forward(self, tokens):
            return self.emb(tokens), weight_of(self.out), self.emb.weight

    embedded, projected, read = noised(Both())(WORDS)
    assert hits(embedded, 4).any()
    assert torch.equal(embedded, projected)
    assert torch.equal(embedded, read)


def test_a_tied_weight_gets_the_gradients_of_both_uses():
    """logits = E~[t] E~^T: the gradient sums the embedding's share and the projection's, both straight through."""
    model = noised(Tied())
    weight, tokens, upstream = stored(model.emb), torch.tensor([3, 4, 4]), torch.randn(3, 12)
    seed = torch.random.get_rng_state()
    model(tokens).backward(upstream)
    torch.random.set_rng_state(seed)
    seen = noised_weight(model)
    expected = upstream.t() @ seen[tokens]
    expected.index_add_(0, tokens, upstream @ seen)
    torch.testing.assert_close(weight.grad, expected)


def noised_weight(model):
    """The noised weight of a Tied, by reading it through its embedding."""
    seen = []
    handle = model.emb.register_forward_hook(lambda m, i, o: seen.append(m.weight.detach().clone()))
    model(WORDS)
    handle.remove()
    return seen[0]


def test_a_part_called_after_the_model_sees_the_models_noise():
    """As fairseq's criterion calls the adaptive softmax after the model."""
    model = noised(Tied(64, 8))
    first = noised_weight(model)
    assert torch.equal(weight_of(model.out), first)


def test_a_part_called_directly_draws_anew_after_a_backward():
    model = noised(Tied(64, 8))
    first = weight_of(model.out)
    assert hits(first, 4).any()
    assert torch.equal(weight_of(model.out), first)
    first.sum().backward()
    assert not torch.equal(weight_of(model.out), first)


def test_a_part_in_training_under_a_root_in_eval_mode_draws_anew_too():
    """Fine-tuning of the last layers alone: model.eval(), then model.head.train()."""
    root = noised(nn.Sequential(nn.Linear(64, 64, bias=False))).eval()
    root[0].train()
    draws = [root(torch.eye(64)).t() for _ in range(3)]
    assert len({tuple(hits(d, 4).tolist()) for d in draws}) == 3


# Activation checkpointing


class Stack(nn.Module):
    """Layers, each checkpointed: reentrant True or False, or None for no checkpointing."""

    def __init__(self, layers, reentrant=None):
        super().__init__()
        self.layers, self.reentrant = nn.ModuleList(layers), reentrant

    def forward(self, x):
        for layer in self.layers:
            if self.reentrant is None:
                x = x + torch.tanh(layer(x))
            else:
                x = x + torch.tanh(checkpoint(layer, x, use_reentrant=self.reentrant))
        return x


def gradients(layers, reentrant, run):
    """The gradients of all parameters, and of the input, after `run(model, x)` from one seed."""
    model = noised(Stack(copy.deepcopy(layers), reentrant), block_size=1)
    torch.manual_seed(3)
    x = torch.randn(5, 2, 8, requires_grad=True)
    run(model, x)
    return [x.grad, *(p.grad for p in model.parameters())]


def one_forward(model, x):
    model(x).square().sum().backward()


def two_forwards(model, x):
    (model(x).square().sum() + model(2 * x).square().sum()).backward()


@pytest.mark.parametrize("run", [one_forward, two_forwards])
@pytest.mark.parametrize("kind", [nn.Linear, Attention])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_with_the_noise_of_the_forward(kind, reentrant, run):
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8) if kind is nn.Linear else Attention() for _ in range(3)]
    expected = gradients(layers, None, run)
    assert all(map(torch.equal, gradients(layers, reentrant, run), expected))


# A forward that does not end


class Stops(nn.Module):
    """A noised layer, and then an error."""

    def __init__(self, error):
        super().__init__()
        self.fc, self.error = nn.Linear(8, 8), error

    def forward(self, x):
        self.fc(x)
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_after_an_exception_inside_forward_the_weight_is_the_stored_one_again(error):
    model = noised(Stops(error))
    with pytest.raises(type(error)):
        model(torch.randn(1, 8))
    assert model.fc.weight is stored(model.fc)
    assert model._quant_noise.depth == 0


def test_an_exception_before_the_forward_starts_does_not_unbalance_the_depth():
    """A hook that the caller had registered refuses the input."""
    model = Read(nn.Linear(8, 8))
    handle = model.register_forward_pre_hook(lambda m, i: (_ for _ in ()).throw(RuntimeError("refused")))
    noised(model)
    with pytest.raises(RuntimeError, match="refused"):
        model()
    handle.remove()
    assert model._quant_noise.depth == 0
    assert hits(model(), 4).any()


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
