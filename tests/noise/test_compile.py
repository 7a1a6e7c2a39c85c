"""Noise under torch.compile: one graph for a network, new noise in each step, the same bits as without a graph."""

import copy
import pickle

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import TOKENS, Tied, zoo

from fairseq_quant_noise import attach_noise, noise_of
from fairseq_quant_noise.noise import operators

KINDS = {
    "proxy": {"kind": "proxy"},
    "mean and int8": {"kind": ["mean", "int8"]},
    "codebook": {"kind": "pq", "n_centroids": 2},
    "clusters": {"choice": "clusters", "n_centroids": 2},
    "int8 by histogram": {"kind": "int8", "range": "histogram"},
    "all blocks": {"kind": "mean", "p": 1.0},
    "growing": {"schedule": {"kind": "linear", "updates": 4}},
}
X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(3))


class Checkpointed(nn.Module):
    """Layers that run again in backward."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def linears():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


#: Networks, and an input of each.
NETWORKS = {
    "linear": (linears, X),
    "zoo": (zoo, TOKENS),
    "tied": (lambda: Tied(16), TOKENS),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), X),
    "recomputed": (Checkpointed, X),
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def noised(build=linears, **rule):
    torch.manual_seed(0)
    sizes = {"conv3x3": 9, "default": 4}
    rules = [{"match": ".*", "p": 0.5, "block_size": sizes, **rule}]
    return attach_noise(build(), {"noise": rules}).train()


def in_graph(model):
    return torch.compile(model, backend="aot_eager")


def steps(model, run, x, count):
    """Outputs and gradients of training steps from one seed, as one list."""
    torch.manual_seed(1)
    found = []
    for _ in range(count):
        out = run(x)
        out.square().sum().backward()
        found += [out.detach(), *(p.grad for p in model.parameters())]
        model.zero_grad()
    return found


def same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_forward_is_one_graph_whatever_the_number_of_weights(name):
    build, x = NETWORKS[name]
    explained = torch._dynamo.explain(noised(build))(x)
    assert explained.break_reasons == []
    assert explained.graph_count <= 2  # `explain` takes the hook of the network for a function by itself
    torch._dynamo.reset()
    torch.compile(noised(build), backend="aot_eager", fullgraph=True)(x).sum().backward()


def test_batch_normalisation_costs_two_breaks_for_the_network():
    torch.manual_seed(0)
    model = noised(lambda: nn.Sequential(*(part for _ in range(3) for part in (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))))
    assert torch._dynamo.explain(model)(torch.randn(2, 4, 3, 3)).graph_break_count <= 2


@pytest.mark.parametrize("name", NETWORKS)
def test_noise_differs_each_step_and_nothing_is_compiled_again(name):
    build, x = NETWORKS[name]
    model = noised(build)
    run = in_graph(model)
    outs = [run(x).detach() for _ in range(2)]
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    outs += [run(x).detach() for _ in range(8)]
    assert all(not torch.equal(one, other) for i, one in enumerate(outs) for other in outs[:i])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert noise_of(model).draws == 10


@pytest.mark.parametrize("name", NETWORKS)
def test_the_noise_is_that_of_a_run_without_a_graph(name):
    build, x = NETWORKS[name]
    plain, ours = noised(build), noised(build)
    same(steps(ours, in_graph(ours), x, 3), steps(plain, plain, x, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_so_is_noise_of_every_kind(kind):
    plain, ours = noised(**KINDS[kind]), noised(**KINDS[kind])
    same(steps(ours, in_graph(ours), X, 4), steps(plain, plain, X, 4))
    assert noise_of(ours).at == noise_of(plain).at == 3


def test_evaluation_in_a_graph_sees_the_stored_weights():
    model = noised().eval()
    dense = linears()
    dense.load_state_dict(model.state_dict())
    assert torch.equal(in_graph(model)(X), dense(X))
    assert noise_of(model).draws == 0


def test_a_layer_in_a_graph_has_the_noise_of_the_forward_around_it():
    plain, ours = noised(), noised()
    ours[2].compile(backend="aot_eager")
    same(steps(ours, ours, X, 3), steps(plain, plain, X, 3))


def test_a_part_draws_anew_once_the_backward_in_a_graph_is_over():
    model = noised()
    run = in_graph(model)
    out = run(X)
    first = model[2](X)
    assert noise_of(model).draws == 1
    assert torch.equal(model[2](X), first)
    out.sum().backward()
    assert not torch.equal(model[2](X), first)
    assert noise_of(model).draws == 2


def test_two_forwards_of_one_graph_have_two_draws():
    model = noised()

    @torch.compile(backend="aot_eager")
    def both(x):
        return model(x), model(x)

    assert not torch.equal(*both(X))
    assert noise_of(model).draws == 2


@pytest.mark.parametrize("how", ["pickled", "copied"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_copy_goes_on_with_noise_of_its_own(how, compiled):
    model = noised(kind="pq", n_centroids=2)
    run = in_graph(model) if compiled else model
    steps(model, run, X, 2)
    twin = pickle.loads(pickle.dumps(model)) if how == "pickled" else copy.deepcopy(model)
    assert noise_of(twin).number != noise_of(model).number
    before = noise_of(model).draws
    twin_run = in_graph(twin) if compiled else twin
    theirs = steps(twin, twin_run, X, 2)
    assert (noise_of(model).draws, noise_of(twin).draws) == (before, before + 2)
    same(theirs, steps(model, run, X, 2))


def test_the_operators_keep_torchs_contract():
    model = noised()
    draw = noise_of(model)
    seed = draw.begin()
    weight = model[0]._parameters["weight"]
    torch.library.opcheck(operators.noised, (weight, seed, draw.number, "0"))
    torch.library.opcheck(operators.spend, (weight.detach(), draw.number))
    schema = "test_schema", "test_autograd_registration", "test_faketensor"  # each call draws another seed
    torch.library.opcheck(operators.begin, (seed, draw.number), test_utils=schema)
