"""A choice written as a plan, which gives each weight what was chosen."""

import collections
import random

import pytest
import yaml
from torch import nn

from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.quantization.budget.options import DENSE, PQ, RANGE, Option, ways
from fairseq_quant_noise.quantization.budget.text import Chosen, bytes_of, plan_text
from fairseq_quant_noise.quantization.targets import resolve_stages
from fairseq_quant_noise.weights.discovery import find_weights


def network(layers=4):
    """A transformer's names and kinds of weights, a convolution among them; the output is tied to the embedding."""

    def layer():
        attention = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("q_proj", "k_proj")})
        return nn.ModuleDict({"self_attn": attention, "fc1": nn.Linear(64, 128), "conv": nn.Conv2d(64, 64, 3)})

    layers = nn.ModuleList([layer() for _ in range(layers)])
    parts = {"embed_tokens": nn.Embedding(200, 64), "layers": layers, "out": nn.Linear(64, 200, bias=False)}
    parts["out"].weight = parts["embed_tokens"].weight
    return nn.ModuleDict(parts)


def resolved(model, text):
    """By the weight's name, what the plan says of it."""
    targets = resolve_stages(Plan.of(yaml.safe_load(text)), model)
    users = collections.Counter(t.codebook for t in targets if t.codebook is not None)
    return {
        t.weight.name: (t.rule.scheme, t.block_size, t.n_centroids, t.centroid_bits, users[t.codebook] > 1)
        if t.block_size is not None
        else (t.rule.scheme, None, None, 16, False)
        for t in targets
    }


@pytest.mark.parametrize("seed", range(10))
def test_the_plan_gives_each_weight_what_was_chosen(seed):
    rng, model = random.Random(seed), network()
    chosen = [Chosen(weight, rng.choice(list(ways(weight.shape)))) for weight in find_weights(model)]
    wanted = {one.name: one.option for one in chosen if one.option.scheme != DENSE}
    text = plan_text(chosen)
    expected = {name: (o.scheme, o.block_size, o.n_centroids, o.centroid_bits, False) for name, o in wanted.items()}
    assert resolved(model, text) == expected
    integers = [rule for rule in Plan.of(yaml.safe_load(text)).stages if rule.scheme != PQ]
    assert {rule.range for rule in integers} <= {RANGE}


def test_the_plan_says_which_weights_share_a_codebook_and_which_have_8_bits():
    """The codebook's bytes count once, in the comments too."""
    model = network()
    own, small, shared = (Option(PQ, 8, 16, bytes=100, **more) for more in ({}, {"centroid_bits": 8}, {"shared": True}))
    options = {"fc1": shared, "q_proj": shared, "k_proj": small, "conv": Option(PQ, 9, 16, bytes=100)}
    chosen = [Chosen(weight, options.get(weight.name.split(".")[-1], own)) for weight in find_weights(model)]
    text = plan_text(chosen)
    found = resolved(model, text)
    assert {name for name, how in found.items() if how[4]} == {n for n in found if n.endswith(("fc1", "q_proj"))}
    assert {name for name, how in found.items() if how[3] == 8} == {n for n in found if n.endswith("k_proj")}
    assert "  #   d 8, K 16, one codebook: 4 weights, 656 bytes, 0.0% of the predicted loss" in text.splitlines()
    assert bytes_of(chosen) == 100 * len(chosen) + 2 * 2 * 8 * 16


def test_weights_alike_are_one_rule_and_stages_are_in_the_paper_s_order():
    chosen = [
        Chosen(weight, Option(PQ, 9 if "conv" in weight.name else 8, 16, bytes=100, loss=1.0))
        for weight in find_weights(network())
    ]
    stages = yaml.safe_load(plan_text(chosen))["stages"]
    assert [stage["match"] for stage in stages] == [
        r"layers\.\d+\.(fc1|conv)",
        r"embed_tokens",
        r"layers\.\d+\.self_attn\.(q_proj|k_proj)",
    ]
    assert stages[0]["block_size"] == {"default": 8, r"layers\.\d+\.conv": 9}
    assert stages[1] == {"match": "embed_tokens", "scheme": "pq", "block_size": 8, "n_centroids": 16}


def test_comments_say_what_each_part_costs():
    model = network(1)
    options = {"embed_tokens": Option("int4", bytes=3000, loss=3.0), "layers.0.fc1": Option(DENSE, bytes=500)}
    rest = Option(PQ, 8, 16, bytes=100, loss=0.25)
    chosen = [
        Chosen(weight, options.get(weight.name, rest)) for weight in find_weights(model) if "conv" not in weight.name
    ]
    lines = plan_text(chosen, ["Found by hand."]).splitlines()
    assert lines[0] == "# Found by hand."
    assert "  # Embeddings: 1 weight, 3,000 bytes, 85.7% of the predicted loss" in lines
    assert "  # Attention: 2 weights, 200 bytes, 14.3% of the predicted loss" in lines
    assert lines[-1] == "# As they are: layers.0.fc1; 1 weight, 500 bytes, 0.0% of the predicted loss"
