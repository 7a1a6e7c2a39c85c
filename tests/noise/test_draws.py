"""When J is drawn anew: once a forward, the same for every use of a weight and for what is computed again."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import Attention, Read, Tied, hits, noised, stored, weight_of

from fairseq_quant_noise import noise_of
from fairseq_quant_noise.noise import attach_rules
from fairseq_quant_noise.plan.rules import NoiseRule
from fairseq_quant_noise.utils import ranks

WORDS = torch.arange(12)


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


# Several processes


@pytest.fixture
def on_rank(monkeypatch):
    """on_rank(r, function): what `function` gives on rank r of 8, from the random state that all ranks have."""

    def run(rank, function):
        monkeypatch.setattr(ranks, "rank_and_world", lambda: (rank, 8))
        torch.manual_seed(3)
        return function()

    return run


def test_ranks_draw_independent_noise_from_one_random_state(on_rank):
    """Of two ranks that each hit a share p, p^2 is hit by both."""
    model, p = noised(nn.Linear(256, 512, bias=False), p=0.2), 0.2
    torch.manual_seed(3)
    alone = hits(weight_of(model), 4)
    drawn = [on_rank(rank, lambda: hits(weight_of(model), 4)) for rank in range(8)]
    assert torch.equal(drawn[0], alone)
    assert torch.equal(on_rank(5, lambda: hits(weight_of(model), 4)), drawn[5]), "a resumed run's"
    for i, one in enumerate(drawn):
        assert float(one.float().mean()) == pytest.approx(p, abs=0.01)
        for other in drawn[:i]:
            assert float((one & other).float().mean()) == pytest.approx(p * p, abs=0.01)


def test_ranks_take_as_much_from_the_random_state_so_that_layerdrop_is_alike(on_rank):
    model = noised(nn.Linear(64, 64, bias=False))
    assert len({on_rank(rank, lambda: (weight_of(model), float(torch.rand(1)))[1]) for rank in range(8)}) == 1


@pytest.mark.parametrize("kind", ["pq", "int4"])
def test_ranks_that_hold_the_same_weights_measure_the_same_on_them(on_rank, kind):
    def measured():
        model = Read(nn.Linear(32, 64))
        attach_rules(model, [NoiseRule(match=".*", p=0.3, kind=kind, block_size=8, refresh=1)])
        for _ in range(3):
            model()
        return noise_of(model).state_dict()["weights"]["part"][0]["phi"]

    first, other = (on_rank(rank, measured) for rank in (0, 5))
    assert first
    assert all(torch.equal(first[key], other[key]) for key in first)


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
    """As in contrastive learning, or R-Drop."""
    (model(x).square().sum() + model(2 * x).square().sum()).backward()


def layers_of(kind):
    torch.manual_seed(0)
    return [nn.Linear(8, 8) if kind is nn.Linear else Attention() for _ in range(3)]


@pytest.mark.parametrize("kind", [nn.Linear, Attention])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_with_the_noise_of_the_forward(kind, reentrant):
    layers = layers_of(kind)
    torch.testing.assert_close(gradients(layers, reentrant, one_forward), gradients(layers, None, one_forward))


def test_checkpointing_finds_the_noise_of_its_rank(on_rank):
    layers = layers_of(nn.Linear)
    rerun = on_rank(3, lambda: gradients(layers, True, two_forwards))
    torch.testing.assert_close(rerun, on_rank(3, lambda: gradients(layers, None, two_forwards)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_forwards_before_a_backward_are_each_recomputed_with_their_own_noise(reentrant):
    layers = layers_of(nn.Linear)
    torch.testing.assert_close(gradients(layers, reentrant, two_forwards), gradients(layers, None, two_forwards))


# A forward that does not end


class Stops(nn.Module):
    """A noised layer, and then an error."""

    def __init__(self, error):
        super().__init__()
        self.fc, self.error = nn.Linear(8, 8), error

    def forward(self, x):
        self.fc(x)
        raise self.error


def test_after_an_exception_inside_forward_the_weight_is_the_stored_one_again():
    error = RuntimeError("out of memory")
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
