"""A model with noise of every kind: shares, clusters, straight-through gradients, and what never changes."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import TOKENS, Read, Tied, stored, zoo

from fairseq_quant_noise.noise import DISTORTIONS, attach_rules, noise_of
from fairseq_quant_noise.plan.rules import NoiseRule

COMPOSED = [("pq", "int8"), ("mean", "int4")]
KINDS = ["proxy", "mean", "pq", "int2", "int4", "int8", *COMPOSED]
CONVS = {
    "1x1": lambda: (nn.Conv2d(32, 48, 1), 8),
    "3x3": lambda: (nn.Conv2d(16, 24, 3), 9),
    "depthwise 3x3": lambda: (nn.Conv2d(192, 192, 3, groups=192), 9),
    "depthwise 5x5": lambda: (nn.Conv2d(128, 128, 5, groups=128), 5),
}
MODULES = {"linear": lambda: (nn.Linear(64, 32), 8), "embedding": lambda: (nn.Embedding(64, 32), 8), **CONVS}
EACH_MODULE = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.upstream(18)] if n in CONVS else []) for n in MODULES]
)
EACH_KIND = pytest.mark.parametrize("kind", KINDS, ids=str)


def read(name, p, kind, **rule):
    """A model that returns its noised weight, and d."""
    torch.manual_seed(0)
    module, block_size = MODULES[name]()
    rule = NoiseRule("part", p, kind, **rule)
    if rule.d != 1:
        rule = replace(rule, block_size=block_size)
    model = Read(module)
    nn.init.normal_(module.weight)
    attach_rules(model, [rule])
    return model.train(), rule.d


def changed(model, d):
    """(n,) bool: the blocks that one forward sees otherwise than they are stored."""
    return (model().detach() != stored(model.part)).reshape(-1, d).any(1)


def by_hand(kind, blocks, phi):
    """phi of all blocks from the paper's formulas; the codebook alone is the distortion's own."""
    for i, name in enumerate([kind] if isinstance(kind, str) else kind):
        state = phi.state() if isinstance(kind, str) else {k[2:]: v for k, v in phi.state().items() if k[0] == str(i)}
        if name == "proxy":
            blocks = torch.zeros_like(blocks)
        elif name == "mean":
            blocks = blocks.mean(1, keepdim=True).expand_as(blocks)
        elif name == "pq":
            blocks = state["centroids"][torch.cdist(blocks, state["centroids"]).argmin(1)]
        else:
            top = 2 ** int(name[3:]) - 1
            scale = (blocks.max().clamp(min=0) - blocks.min().clamp(max=0)) / top
            zero = int((-blocks.min().clamp(max=0) / scale).round())
            blocks = torch.fake_quantize_per_tensor_affine(blocks, scale.item(), zero, 0, top)
    return blocks


# Which blocks


@EACH_MODULE
@EACH_KIND
def test_the_share_of_noised_blocks_is_p(name, kind):
    model, d = read(name, 0.3, kind, n_centroids=4)
    count = sum(int(changed(model, d).sum()) for _ in range(5))
    n = 5 * stored(model.part).numel() // d
    assert abs(count - 0.3 * n) < 5 * math.sqrt(n * 0.3 * 0.7) + 0.002 * n  # a few numbers are codes already


@EACH_MODULE
@pytest.mark.parametrize("kind", ["proxy", ("pq", "int8")], ids=str)
def test_blocks_of_one_centroid_are_hit_together(name, kind):
    model, d = read(name, 0.3, kind, choice="clusters", n_centroids=8)
    shares = []
    for _ in range(40):
        hit = changed(model, d)
        codes = noise_of(model).weights["part"].rules[0].clusters.codes
        sizes = codes.bincount(minlength=8)
        shares.append(codes[hit].bincount(minlength=8) / sizes)
    shares = torch.stack(shares)  # (40, 8): what share of a cluster is hit
    assert ((shares == 0) | (shares > (0.95 if d == 1 else 0.5))).all()  # a block may be its centroid
    n = shares.numel()
    assert abs(int((shares > 0).sum()) - 0.3 * n) < 5 * math.sqrt(n * 0.3 * 0.7)


@EACH_KIND
@pytest.mark.parametrize("choice", ["subvectors", "clusters"])
def test_p_1_hits_everything_and_p_0_nothing(kind, choice):
    model, d = read("linear", 1.0, kind, choice=choice, n_centroids=4)
    phi = noise_of(model).weights["part"].rules[0].phi
    seen, weight = model().detach(), stored(model.part).detach()
    torch.testing.assert_close(seen, by_hand(kind, weight.reshape(-1, d), phi).reshape(seen.shape))
    assert torch.equal(phi(weight.reshape(-1, d), None).reshape(seen.shape), seen)
    model, d = read("linear", 0.0, kind, choice=choice)
    assert not changed(model, d).any()


@EACH_MODULE
@EACH_KIND
def test_hit_blocks_are_phi_by_hand_and_the_others_are_as_stored(name, kind):
    model, d = read(name, 0.5, kind, n_centroids=4)
    seen, blocks = model().detach().reshape(-1, d), stored(model.part).detach().reshape(-1, d)
    rule, hit = noise_of(model).weights["part"].hits[0]
    assert torch.equal(seen[~hit], blocks[~hit])
    torch.testing.assert_close(seen[hit], by_hand(kind, blocks, rule.phi)[hit])


def test_pq_noise_between_refreshes_is_the_nearest_of_a_frozen_codebook():
    model, d = read("linear", 1.0, "pq", n_centroids=8)
    model()
    centroids = noise_of(model).weights["part"].rules[0].phi.centroids.clone()
    with torch.no_grad():
        stored(model.part).add_(torch.randn(32, 64))
    expected = centroids[torch.cdist(stored(model.part).detach().view(-1, d), centroids).argmin(1)]
    assert torch.equal(model().detach().view(-1, d), expected)


# Gradients


@EACH_KIND
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_loss_and_gradients_are_those_of_w_plus_a_constant(kind, p):
    """W' = W + (psi(W) - W).detach() on the same J, through two layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    attach_rules(model, [NoiseRule(".*", p, kind, n_centroids=4)])
    x = torch.randn(5, 16, requires_grad=True)
    loss = model.train()(x).square().sum()
    found = torch.autograd.grad(loss, [x, *model.parameters()])

    weights = {}
    for name in ("0", "2"):
        ((rule, hit),) = noise_of(model).weights[name].hits
        weight = stored(model.get_submodule(name))
        blocks = weight.detach().reshape(-1, rule.rule.d)
        hit = torch.ones(len(blocks), dtype=torch.bool) if hit is None else hit
        seen = torch.where(hit[:, None], by_hand(kind, blocks, rule.phi), blocks).view_as(weight)
        weights[name] = weight + (seen - weight).detach()
    hidden = F.linear(x, weights["0"], model[0].bias).tanh()
    expected_loss = F.linear(hidden, weights["2"], model[2].bias).square().sum()
    expected = torch.autograd.grad(expected_loss, [x, *model.parameters()])
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(found, expected)


# What never changes


@pytest.mark.upstream(1)
@pytest.mark.parametrize(
    ("kind", "choice"),
    [*[(kind, "subvectors") for kind in (*DISTORTIONS, *COMPOSED)], ("proxy", "clusters"), ("pq", "clusters")],
    ids=str,
)
def test_no_kind_writes_the_stored_weight_and_eval_mode_sees_none_of_it(kind, choice):
    model = zoo()
    expected = model.eval()(TOKENS)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rule = {"choice": choice, "n_centroids": 4}
    attach_rules(
        model, [NoiseRule("fc|emb|attn.*", 0.5, kind, **rule), NoiseRule("conv", 0.5, kind, block_size=9, **rule)]
    )
    assert not torch.equal(model.train()(TOKENS), expected)
    for _ in range(5):
        model(TOKENS).sum().backward()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(model.eval()(TOKENS), expected)


@pytest.mark.parametrize("kind", ["mean", "pq", "int4", ("pq", "int8")], ids=str)
@pytest.mark.parametrize("choice", ["subvectors", "clusters"])
def test_a_tied_weight_is_seen_alike_by_both_of_its_modules(kind, choice):
    class Both(Tied):
        def forward(self, tokens):
            return self.emb(tokens), self.out(torch.eye(8)).t()

    torch.manual_seed(0)
    model = Both(64)
    attach_rules(model.train(), [NoiseRule("emb", 0.5, kind, choice=choice, n_centroids=4)])
    embedded, projected = model(torch.arange(64))
    assert torch.equal(embedded, projected)
    assert not torch.equal(embedded, stored(model.emb))
    assert len(noise_of(model).weights) == 1


@pytest.mark.parametrize("kind", ["pq", "int4"])
@pytest.mark.parametrize("choice", ["subvectors", "clusters"])
def test_a_layers_noise_does_not_depend_on_layers_that_are_skipped(kind, choice):
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, skip):
            return self.b.weight if skip else (self.a.weight, self.b.weight)[1]

    model = Skip()
    attach_rules(model.train(), [NoiseRule(".*", 0.5, kind, choice=choice, range="histogram")])
    draws = [torch.manual_seed(5) and model(skip) for skip in (True, False, True)]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


def test_muted_noise_shows_the_stored_weight():
    model, d = read("linear", 1.0, "int2")
    noise_of(model).muted = True
    assert not changed(model, d).any()
    noise_of(model).muted = False
    assert changed(model, d).any()


@pytest.mark.upstream(28)
@pytest.mark.parametrize("bits", range(2, 9))
def test_int_noise_of_n_bits_has_2_to_the_n_values(bits):
    torch.manual_seed(0)
    model = Read(nn.Linear(64, 64))
    nn.init.uniform_(model.part.weight, -1, 1)
    attach_rules(model, [NoiseRule("part", 1.0, f"int{bits}")])
    assert len(model.train()().unique()) == 2**bits
