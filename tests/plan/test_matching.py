"""Rules against the names of weights, and the settings that a name, a type or a kernel gives."""

import pytest
from torch import nn
from toys import refuses, zoo

from fairseq_quant_noise.noise import attach_rules, noise_of
from fairseq_quant_noise.plan.matching import match_rules
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.plan.rules import StageRule
from fairseq_quant_noise.quantization.targets import resolve_stages

# Rules against names


def test_a_rule_must_match_the_whole_name():
    rules = [StageRule("fc"), StageRule(r".*\.fc")]
    with refuses("stage rule 'fc' matches no weight of this model; its weights are a.fc, fc1"):
        match_rules("stage", rules, ["a.fc", "fc1"])
    with refuses(r"stage rule '\.\*\\\.fc' matches no weight"):
        match_rules("stage", rules, ["fc", "a.fc1"])


def test_a_name_has_its_rules_in_the_plans_order():
    first, second = StageRule(".*"), StageRule("a")
    assert match_rules("stage", [first, second], ["a", "b"]) == [[first, second], [first]]


def test_a_rule_that_matches_nothing_shows_some_names_of_a_large_model():
    with refuses(r"its weights are n0, n1, …, n98, n99 \("):
        match_rules("stage", [StageRule("x")], [f"n{i}" for i in range(100)])


def test_a_rule_that_matches_nothing_in_a_model_without_weights_says_so():
    with refuses("its weights are none"):
        match_rules("stage", [StageRule("x")], [])


def test_a_pattern_with_a_line_break_is_refused_in_one_line():
    """YAML's `match: |` keeps the line's end."""
    with refuses("matches no weight"):
        match_rules("stage", [StageRule("fc\n")], ["fc"])
    with refuses("not a regular expression"):
        StageRule("fc(\n")


# Settings by name


@pytest.mark.parametrize(("name", "size"), [("emb.0", 8), ("emb.1", 4), ("emb.2", 8)])
def test_the_first_pattern_that_matches_a_name_gives_its_block_size(name, size):
    rule = StageRule(".*", block_size={"default": 8, r".*\.1": 4, r"emb\.1": 2})
    assert rule.block_size_of(name, nn.Linear(8, 8)) == size


def test_a_name_without_a_value_and_without_a_default_is_refused():
    rule = StageRule("fc.*", n_centroids={"fc1": 16})
    assert rule.n_centroids_of("fc1", nn.Linear(8, 8)) == 16
    with refuses(
        r"stage 'fc\.\*': n_centroids gives no value for fc2; add a pattern or a type that matches it, or a de"
    ):
        rule.n_centroids_of("fc2", nn.Linear(8, 8))


@pytest.mark.parametrize("n", [4097, {"default": 10000}])
def test_more_than_4096_centroids_are_refused_by_name(n):
    plan = Plan.of({"stages": [{"match": "fc", "n_centroids": n, "block_size": 4}]})
    with refuses("n_centroids is .* for the weight of module 'fc'; give at most 4096, codes of 12 bits"):
        resolve_stages(plan, zoo())


# Sizes by type and by kernel


def mobile():
    """As a MobileNet: kernels of 1 x 1 and 3 x 3, a classifier, and an embedding."""
    convs = {"stem": nn.Conv2d(3, 8, 3), "expand": nn.Conv2d(8, 16, 1), "depth": nn.Conv2d(16, 16, 3, groups=16)}
    return nn.ModuleDict({**convs, "head": nn.Linear(16, 6), "words": nn.Embedding(20, 6), "wave": nn.Conv1d(4, 4, 5)})


SIZES = {"conv3x3": 9, "conv1x1": 4, "conv5": 5, "Embedding": 3, "default": 8}


def test_block_sizes_go_by_kernel_and_type():
    plan = Plan.of({"stages": [{"match": ".*", "block_size": SIZES}]})
    found = {target.weight.name: target.block_size for target in resolve_stages(plan, mobile())}
    assert found == {"stem": 9, "expand": 4, "depth": 9, "head": 8, "words": 3, "wave": 5}


def test_so_do_those_of_the_noise():
    model = mobile()
    attach_rules(model, Plan.of({"noise": [{"match": ".*", "kind": "mean", "p": 0.1, "block_size": SIZES}]}).noise)
    found = {name: noise.rules[0].rule.d for name, noise in noise_of(model).weights.items()}
    assert found == {"stem": 9, "expand": 4, "depth": 9, "head": 8, "words": 3, "wave": 5}


def test_a_size_for_each_weight_is_asked_for():
    rules = Plan.of({"noise": [{"match": ".*", "p": 0.1, "block_size": {"conv3x3": 9}}]}).noise
    with refuses(r"noise rule '\.\*': block_size gives no value for expand; add a pattern or a type"):
        attach_rules(mobile(), rules)
    with refuses(r"plan: noise\[0\]: block_size: 'conv3x3' is 0; give a whole number from 1 up"):
        Plan.of({"noise": [{"match": ".*", "p": 0.1, "block_size": {"conv3x3": 0}}]})
