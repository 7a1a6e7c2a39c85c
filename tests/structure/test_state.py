"""Pruning and sharing of a state dict, and maps of layers in the file."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stacks import PLAN, net
from toys import refuses

from fairseq_quant_noise import quantize_, share_layers_
from fairseq_quant_noise.artifact import pack
from fairseq_quant_noise.structure.state import keep_state, layer_ties, maps_and_ties, share_state, stack_sizes


def test_stacks_are_counted_by_name():
    state = {"encoder.layers.0.fc.weight": 0, "encoder.layers.11.fc.weight": 0, "decoder.layers.1.x": 0, "layers.x": 0}
    assert stack_sizes(state) == {"encoder.layers": 12, "decoder.layers": 2}


def test_lists_inside_a_layer_are_no_stacks():
    assert stack_sizes({"encoder.layers.0.expert.layers.5.weight": 0}) == {"encoder.layers": 1}


def test_kept_layers_are_numbered_anew_and_other_stacks_stay():
    state = {f"{side}.layers.{i}.w": torch.tensor(i) for side in ("encoder", "decoder") for i in range(4)}
    kept = keep_state({**state, "decoder.norm": torch.tensor(9)}, {"decoder.layers": [1, 3]})
    assert {name: int(t) for name, t in kept.items() if "decoder" in name} == {
        "decoder.layers.0.w": 1,
        "decoder.layers.1.w": 3,
        "decoder.norm": 9,
    }
    assert len(kept) == 7


def test_codes_are_pruned_with_their_weight():
    state = quantize_(net(), PLAN).state_dict()
    kept = keep_state(state, {"layers": [2]})
    assert torch.equal(kept["layers.0.fc.weight.codes"], state["layers.2.fc.weight.codes"])
    assert stack_sizes(kept) == {"layers": 1}


@pytest.mark.parametrize("start", ["first", "mean"])
def test_a_state_is_shared_as_a_network_is(start):
    state, changed = share_state(net().state_dict(), 2, start)
    expected = share_layers_(net(), 2, start).state_dict()
    assert changed == ["layers"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert state["layers.1.fc.weight"] is state["layers.0.fc.weight"]


def test_sharing_what_is_shared_changes_nothing():
    state, _ = share_state(net().state_dict(), 2, "mean")
    again, changed = share_state(state, 2, "mean")
    assert changed == []
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_layers_in_codes_that_differ_are_refused():
    with refuses(r"layers\.0\.\S+: is quantized; share the layers of the dense checkpoint"):
        share_state(quantize_(net(), PLAN).state_dict(), 2)


def test_layers_in_codes_that_are_shared_stay():
    state = quantize_(share_layers_(net(), 2), PLAN).state_dict()
    again, changed = share_state(state, 2)
    assert changed == []
    assert again.keys() == state.keys()


def test_layers_of_unlike_tensors_are_refused():
    state = net().state_dict()
    del state["layers.1.fc.bias"]
    with refuses(r"layers: layers 0 to 1 differ in fc\.bias; they cannot be shared"):
        share_state(state, 2)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_maps_say_what_ties_said(owners):
    stored = [j if j < i and owners[j] == owners[i] else i for i, j in enumerate(map(owners.index, owners))]
    ties = {
        f"d.layers.{i}.{part}.weight": f"d.layers.{j}.{part}.weight"
        for i, j in enumerate(stored)
        for part in ("fc1", "fc2")
        if i != j
    }
    names = [f"d.layers.{i}.{part}.weight" for i, j in enumerate(stored) for part in ("fc1", "fc2") if i == j]
    maps, rest = maps_and_ties({**ties, "out.weight": "emb.weight"}, [*names, "emb.weight"])
    assert rest == {"out.weight": "emb.weight"}
    assert maps == ({"d.layers": stored} if ties else {})
    assert layer_ties(maps, names) == ties


def test_a_layer_that_shares_only_some_weights_keeps_its_ties():
    ties = {"layers.1.fc1.weight": "layers.0.fc1.weight"}
    names = ["layers.0.fc1.weight", "layers.0.fc2.weight", "layers.1.fc2.weight"]
    assert maps_and_ties(ties, names) == ({}, ties)


def test_the_manifest_holds_the_map_and_no_tie_of_a_layer():
    manifest = pack(share_layers_(net(6), 3)).manifest
    assert manifest.layers == {"layers": [0, 0, 0, 3, 3, 3]}
    assert manifest.ties == {}
