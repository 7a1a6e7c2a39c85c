"""Which weights a model has: each once, with its ties."""

import pytest
import torch
from torch import nn
from toys import Tied, Zoo, noised

from fairseq_quant_noise.layers import PQWeight, quantize_weight_
from fairseq_quant_noise.weights import find_weights, stored_weight


class Shares(nn.Module):
    """Any module that holds a weight of another."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight


def names(model):
    return [(w.name, [alias for alias, _ in w.aliases]) for w in find_weights(model)]


def test_weights_come_in_the_models_order_with_their_ties():
    projections = [(f"attn.{p}_proj", []) for p in ("q", "k", "v", "out")]
    assert names(Zoo()) == [("emb", ["out"]), *projections, ("fc", []), ("conv", [])]


def test_norms_biases_and_fused_projections_are_not_among_them():
    model = nn.ModuleDict({"norm": nn.LayerNorm(8), "attn": nn.MultiheadAttention(8, 2), "bn": nn.BatchNorm2d(4)})
    assert names(model) == [("attn.out_proj", [])]


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
