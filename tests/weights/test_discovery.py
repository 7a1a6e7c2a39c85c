"""Which weights a model has: each once, with its ties."""

import pytest
import torch
from torch import nn
from toys import Tied, Zoo, noised, refuses

from fairseq_quant_noise import attach_noise, cover, quantize_
from fairseq_quant_noise.layers import PQWeight, quantize_weight_
from fairseq_quant_noise.weights import blocks
from fairseq_quant_noise.weights.discovery import find_weights, stored_weight, uncovered


class Shares(nn.Module):
    """Any module that holds a weight of another."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight


def names(model):
    return [(w.place.path, [alias.path for alias in w.aliases]) for w in find_weights(model)]


def test_weights_come_in_the_models_order_with_their_ties():
    projections = [(f"attn.{p}_proj", []) for p in ("q", "k", "v", "out")]
    assert names(Zoo()) == [("emb", ["out"]), *projections, ("fc", []), ("conv", [])]


def test_norms_and_biases_are_not_among_them():
    model = nn.ModuleDict({"norm": nn.LayerNorm(8), "fc": nn.Linear(8, 2), "bn": nn.BatchNorm2d(4)})
    assert names(model) == [("fc", [])]


def test_a_model_that_is_one_layer_has_the_empty_name():
    assert names(nn.Linear(4, 4)) == [("", [])]


def test_the_owner_is_the_first_linear_even_where_another_type_holds_the_weight_before():
    linear = nn.Linear(4, 4)
    model = nn.ModuleDict({"early": Shares(linear.weight), "fc": linear, "late": Shares(linear.weight)})
    assert sorted(names(model)[0][1]) == ["early", "late"]
    assert names(model)[0][0] == "fc"


def test_a_weight_without_a_linear_embedding_or_conv2d_is_left_alone():
    assert names(nn.ModuleDict({"a": Shares(nn.Parameter(torch.randn(4, 4)))})) == []


def test_a_module_that_is_used_under_two_names_is_one_weight():
    linear = nn.Linear(4, 4)
    assert names(nn.ModuleDict({"a": linear, "b": linear})) == [("a", [])]


def test_modules_without_a_weight_yet_are_skipped():
    assert names(nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.Identity())) == []


def test_a_module_whose_child_is_called_weight_is_no_weight():
    model = nn.ModuleDict({"weight": nn.Linear(4, 4)})
    assert names(model) == [("weight", [])]


def test_the_stored_weight_is_the_parameter_even_while_a_forward_sees_noise():
    model = noised(nn.Sequential(nn.Linear(8, 8), nn.Identity()), p=1.0)
    seen = []
    model[1].register_forward_hook(lambda *_: seen.extend([stored_weight(model[0]), model[0].weight]))
    model(torch.ones(1, 8))
    assert seen[0] is model[0]._parameters["weight"]
    assert not seen[1].any()


@pytest.mark.upstream(8)
def test_a_quantized_weight_keeps_its_name_its_ties_and_its_shape():
    model = Tied()
    before = names(model)
    quantize_weight_(find_weights(model)[0], torch.zeros(12, 2, dtype=torch.uint8), torch.randn(3, 4))
    weight = find_weights(model)[0]
    assert names(model) == before == [("emb", ["out"])]
    assert isinstance(weight.stored, PQWeight)
    assert weight.shape == (12, 8)


# What no rule can name


class Own(nn.Module):
    """A matrix and a vector of its own, which no rule can name, beside a Linear."""

    def __init__(self):
        super().__init__()
        self.table, self.vector = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(1, 1, 8))
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x @ self.table + self.vector)


@pytest.mark.parametrize("use", ["noise", "stages"])
def test_weights_that_no_rule_can_name_are_said_once(caplog, use):
    model = nn.Sequential(Own(), nn.Linear(8, 8))
    share = 64 / sum(p.numel() for p in model.parameters())
    if use == "noise":
        attach_noise(model, {"noise": [{"match": ".*", "p": 0.1, "block_size": 8}]})
    else:
        quantize_(model, {"stages": [{"match": ".*"}]}, progress=lambda line: None)
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == (
        f"1 weights ({share:.1%} of the parameters) stay as they are, since no rule covers modules of their type: "
        "0.table (a parameter (8, 8) of Own); fairseq_quant_noise.cover makes a type known"
    )


@pytest.mark.parametrize("use", ["noise", "stages"])
def test_a_strict_caller_is_refused_before_any_work(use):
    model = nn.Sequential(Own(), nn.Linear(8, 8))
    with refuses(r"^1 weights .*: 0\.table \(a parameter \(8, 8\) of Own\)"):
        if use == "noise":
            attach_noise(model, {"noise": [{"match": ".*", "p": 0.1, "block_size": 8}]}, strict=True)
        else:
            quantize_(model, {"stages": [{"match": ".*"}]}, strict=True)
    assert type(model[1]) is nn.Linear
    attach_noise(model[1], {"noise": [{"match": ".*", "p": 0.1}]}, strict=True)


def test_a_type_of_module_can_be_made_known(monkeypatch):
    monkeypatch.setattr(blocks, "_COVERED", [*blocks._COVERED])
    cover(Own, "table")
    model = noised(Own(), p=1.0)
    assert names(model) == [("", []), ("fc", [])]
    assert [w.name for w in find_weights(model)] == ["table", "fc"]
    assert not uncovered(model)
    before = model._parameters["table"].clone()
    model.fc.weight.data.fill_(1)
    assert torch.equal(model(torch.ones(1, 8)).flatten(), model.fc.bias)
    assert torch.equal(model.table, before)


def test_nothing_is_said_where_rules_can_name_all(caplog):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 8), nn.LayerNorm(8))
    model.append(nn.Linear(8, 8))
    model[-1].weight = model[3].weight
    attach_noise(model, {"noise": [{"match": ".*", "kind": "mean", "p": 0.1, "block_size": 1}]})
    assert not caplog.records
