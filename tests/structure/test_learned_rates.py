"""LayerDrop whose rates are learned: the rates, their gradients, and which layers stay."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from stacks import net
from torch import nn
from toys import refuses

from fairseq_quant_noise import attach_noise, keep_layers_, learn_layerdrop_, share_layers_
from fairseq_quant_noise.structure.learned_rates import keep_rates
from fairseq_quant_noise.structure.modules import find_stacks

TOKENS = torch.tensor([[0, 3, 5, 7], [11, 2, 2, 1]])


class Residual(nn.Module):
    """A layer that learns."""

    def __init__(self, dim=6):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Nothing(nn.Module):
    """A layer that does nothing."""

    def forward(self, x):
        return x * 1.0


class Harmful(nn.Module):
    """A layer that disturbs."""

    def forward(self, x):
        return x + 0.3 * torch.randn_like(x)


class Pairs(Nothing):
    """A layer that returns a tuple, as a decoder's."""

    def forward(self, x, state=None):
        return 2 * x, state


class Stack(nn.Module):
    """Layers and a product."""

    def __init__(self, layers):
        super().__init__()
        self.layers, self.out = nn.ModuleList(layers), nn.Linear(6, 1)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.out(x)


def trained(useless, at, seed):
    """A network of four layers, of which one is useless, after 300 updates; and what it should compute."""
    torch.manual_seed(seed)
    layers = [Residual() for _ in range(3)]
    layers.insert(at, useless())
    model, directions = learn_layerdrop_(Stack(layers), 0.25).train(), torch.randn(6, 8)
    steps = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        x = torch.randn(128, 6)
        steps.zero_grad()
        F.mse_loss(model(x), torch.sin(2 * x @ directions).sum(1, keepdim=True) / 2).backward()
        steps.step()
    return model


@pytest.mark.upstream(33)
@pytest.mark.parametrize("useless", [Nothing, Harmful])
@pytest.mark.parametrize(("at", "seed"), [(1, 0), (2, 1)])
def test_a_useless_layer_is_the_one_that_goes(useless, at, seed):
    model = trained(useless, at, seed)
    rates = model.layers.keep_rates().detach()
    assert rates.argmin() == at
    assert rates[at] < 0.65
    assert rates.mean() == pytest.approx(0.75, abs=1e-4)
    x, before = torch.randn(9, 6), model.eval()
    expected = before(x).detach()
    assert keep_layers_(model, "learned") == {"layers": [i for i in range(4) if i != at]}
    if useless is Nothing:
        assert torch.equal(model(x), expected)
    model.train()(x).sum().backward()  # training goes on, with equal rates
    assert not [name for name in model.state_dict() if "keep_scores" in name]


# Rates


@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 300.0])
def test_their_mean_is_what_was_asked_for_and_they_go_by_the_scores(p, scale):
    scores = scale * torch.randn(7, generator=torch.Generator().manual_seed(0))
    rates = keep_rates(scores, p)
    assert rates.mean() == pytest.approx(1 - p, abs=1e-4)
    assert 0 < rates.min() <= rates.max() < 1
    assert torch.equal(rates[scores.argsort()], rates.sort().values)


def test_their_derivative_is_that_of_differences():
    scores = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.7])
    found = torch.autograd.functional.jacobian(lambda s: keep_rates(s, 0.4), scores)
    step = 1e-2
    for i in range(5):
        by = step * F.one_hot(torch.tensor(i), 5)
        differences = (keep_rates(scores + by, 0.4) - keep_rates(scores - by, 0.4)) / (2 * step)
        torch.testing.assert_close(found[:, i], differences, atol=1e-3, rtol=1e-2)


def test_layers_stay_as_often_as_their_rates_say():
    model = learn_layerdrop_(Stack([Pairs(), Nothing(), Pairs()]), 0.4).train()
    model.out = nn.Identity()
    with torch.no_grad():
        model.layers.keep_scores.copy_(torch.tensor([1.0, 0.0, -1.0]))
    rates = model.layers.keep_rates().tolist()
    doubled = torch.stack(
        [model(torch.ones(1, 6)).detach()[0, 0] for _ in range(3000)]
    ).log2()  # how many of the two Pairs
    assert doubled.mean() == pytest.approx(rates[0] + rates[2], abs=0.05)
    assert (doubled == 2).float().mean() == pytest.approx(rates[0] * rates[2], abs=0.04)


def test_the_gradient_of_a_rate_is_the_difference_that_its_layer_makes():
    """For a loss that is quadratic in m, the mean over draws is exact."""
    model = learn_layerdrop_(Stack([Pairs()]), 0.3).train()
    model.out = nn.Identity()
    rates, x = [], torch.ones(1, 6, requires_grad=True)
    for _ in range(2000):
        model.layers.keep_scores.grad = None
        rate = torch.full((1,), 0.7, requires_grad=True)
        model.layers.keep_rates = lambda rate=rate: rate
        (model(x) - 3).square().sum().backward()
        rates.append(rate.grad)
    with_layer, without = 6 * (2 - 3) ** 2, 6 * (1 - 3) ** 2
    assert torch.cat(rates).mean() == pytest.approx(with_layer - without, rel=0.1)


# In a network


def test_evaluation_uses_every_layer():
    model, dense = net().eval(), net().eval()
    learn_layerdrop_(model, 0.5)
    assert torch.equal(model(TOKENS), dense(TOKENS))


def test_a_layer_that_is_left_out_gets_no_gradient_and_passes_that_of_the_others_on():
    model = learn_layerdrop_(net(), 0.5).train()
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        model.zero_grad()
        model(TOKENS).sum().backward()
        used = tuple(layer.fc.weight.grad is not None for layer in model.layers)
        seen.add(used)
        assert model.emb.weight.grad.abs().sum() > 0
        assert torch.is_grad_enabled()
    assert len(seen) > 5


def test_an_error_in_a_layer_leaves_gradients_on():
    class Broken(nn.Module):
        def forward(self, x):
            raise ValueError("broken")

    model = learn_layerdrop_(Stack([Broken()]), 0.5).train()
    for _ in range(10):
        with pytest.raises(ValueError, match="broken"):
            model(torch.ones(1, 6))
        assert torch.is_grad_enabled()


def test_shared_layers_stay_or_go_together():
    model = learn_layerdrop_(share_layers_(net(8), 2), 0.5)
    assert model.layers.keep_scores.shape == (4,)
    with torch.no_grad():
        model.layers.keep_scores.copy_(torch.tensor([0.0, 3.0, -1.0, 2.0]))
    with refuses("give a multiple of 2, which share their weights"):
        keep_layers_(copy.deepcopy(model), "learned:3")
    assert keep_layers_(model, "learned") == {"layers": [2, 3, 6, 7]}


def test_how_many_stay_can_be_said():
    model = learn_layerdrop_(net(5), 0.2)
    with torch.no_grad():
        model.layers.keep_scores.copy_(torch.tensor([0.0, 3.0, -1.0, 2.0, 1.0]))
    assert keep_layers_(copy.deepcopy(model), "learned") == {"layers": [0, 1, 3, 4]}
    assert keep_layers_(copy.deepcopy(model), "learned:2") == {"layers": [1, 3]}
    for n in (0, 6):
        with refuses(rf"learned:{n}: layers has 5 layers; give from 1 to 5"):
            keep_layers_(model, f"learned:{n}")


def test_a_network_that_learned_none_is_refused():
    with refuses("keep_layers learned: no rates of layers were learned; train with --learn-layerdrop"):
        keep_layers_(net(), "learned")
    with refuses("p is 1.5; give a probability between 0 and 1"):
        learn_layerdrop_(net(), 1.5)
    with refuses("no ModuleList called 'layers'"):
        learn_layerdrop_(nn.Linear(2, 2), 0.1)


def test_stacks_without_layerdrop_are_left_alone():
    model = net()
    before = find_stacks(model)["layers"]
    assert find_stacks(learn_layerdrop_(model))["layers"] is before


@pytest.mark.parametrize("how", ["pickled", "copied"])
def test_a_copy_learns_by_itself(how):
    model = learn_layerdrop_(Stack([Residual(), Residual()]), 0.5).train()
    model(torch.ones(1, 6)).sum().backward()
    twin = pickle.loads(pickle.dumps(model)) if how == "pickled" else copy.deepcopy(model)
    twin.zero_grad()
    model.zero_grad()
    twin(torch.ones(1, 6)).sum().backward()
    assert twin.layers.keep_scores.grad is not None
    assert model.layers.keep_scores.grad is None


def test_noise_acts_in_layers_that_learn_their_rates():
    model = learn_layerdrop_(net(), 0.5)
    attach_noise(model, {"noise": [{"match": r"layers\.\d+\.fc", "p": 0.5, "block_size": 4}]}).train()
    model(TOKENS).sum().backward()
    assert model.layers.keep_scores.grad.isfinite().all()
