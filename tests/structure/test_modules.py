"""Sharing and pruning of a network: one weight for noise, optimizer, stages and file, whatever uses it."""

import copy

import pytest
import torch
from stacks import PLAN, layer_of, net
from torch import nn
from toys import refuses

from fairseq_quant_noise import attach_noise, keep_layers_, load, quantize_, save, share_layers_
from fairseq_quant_noise.layers import quantized_weights
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.quantization.structure import apply_structure
from fairseq_quant_noise.structure.modules import LayerStack, find_stacks, shared_chunk
from fairseq_quant_noise.weights.discovery import find_weights

TOKENS = torch.tensor([[0, 3, 5, 7], [11, 2, 2, 1]])


def test_layers_of_a_chunk_have_the_same_parameters():
    model = share_layers_(net(), 2)
    for first, other in ((0, 1), (2, 3)):
        pairs = zip(model.layers[first].parameters(), model.layers[other].parameters(), strict=True)
        assert all(one is two for one, two in pairs)
    assert model.layers[0].fc.weight is not model.layers[2].fc.weight
    assert model.layers[0] is not model.layers[1], "each use has a module of its own"


def test_parameters_and_gradients_are_there_once():
    model = share_layers_(net(), 2)
    assert len(list(model.parameters())) == 1 + 2 * 5
    model(TOKENS).sum().backward()
    one, both = model.layers[0].fc.weight.grad, net()
    for i, source in ((0, 0), (1, 0), (2, 2), (3, 2)):
        both.layers[i].load_state_dict(net().layers[source].state_dict())
    both(TOKENS).sum().backward()
    torch.testing.assert_close(one, both.layers[0].fc.weight.grad + both.layers[1].fc.weight.grad)


def test_a_chunk_starts_from_its_first_layer_or_from_the_mean():
    dense = net()
    first, mean = share_layers_(copy.deepcopy(dense), 2), share_layers_(copy.deepcopy(dense), 2, "mean")
    assert torch.equal(first.layers[1].fc.weight, dense.layers[0].fc.weight)
    expected = (dense.layers[2].norm.weight + dense.layers[3].norm.weight) / 2
    torch.testing.assert_close(mean.layers[3].norm.weight, expected)
    torch.testing.assert_close(mean.layers[0].fc.bias, (dense.layers[0].fc.bias + dense.layers[1].fc.bias) / 2)


def test_the_mean_of_shared_layers_changes_nothing():
    model = share_layers_(net(), 2)
    before = copy.deepcopy(model.state_dict())
    share_layers_(model, 2, "mean")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_sharing_works_without_memory_for_the_weights():
    with torch.device("meta"):
        model = net()
    assert len(list(share_layers_(model, 4, "mean").parameters())) == 1 + 5


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_the_chunk_of_a_network_is_seen(chunk):
    assert shared_chunk(share_layers_(net(), chunk).layers) == chunk


def test_a_shared_weight_has_one_noise_for_all_its_uses():
    model = attach_noise(share_layers_(net(), 2), {"noise": [{"match": r"layers\.\d+\.fc", "p": 0.5, "block_size": 4}]})
    seen = []
    for i in range(4):
        model.layers[i].fc.register_forward_hook(lambda module, *_: seen.append(module.weight.detach().clone()))
    model.train()(TOKENS)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert (seen[0] == 0).any()


def test_a_shared_weight_is_quantized_once():
    model = quantize_(share_layers_(net(), 2), PLAN)
    assert list(quantized_weights(model)) == [
        *("emb", "layers.0.fc", "layers.0.inner.0", "layers.2.fc", "layers.2.inner.0")
    ]
    assert model.layers[1].fc._modules["weight"] is model.layers[0].fc._modules["weight"]


def test_layers_that_differ_cannot_be_shared():
    model = net()
    model.layers[1].fc = nn.Linear(16, 16, bias=False)
    with refuses(r"layers\.1: its chunk has a layer without the same fc"):
        share_layers_(model, 2)


def test_a_network_without_layers_is_refused():
    with refuses("no ModuleList called 'layers'"):
        share_layers_(nn.Sequential(nn.Linear(4, 4)), 2)
    with refuses("no ModuleList called 'layers'"):
        keep_layers_(nn.Linear(4, 4), "every-other")


def test_lists_inside_a_layer_are_no_stacks():
    model = nn.ModuleDict({"outer": nn.Module()})
    model["outer"].layers = nn.ModuleList([net(2), net(2)])
    assert list(find_stacks(model)) == ["outer.layers"]


def test_layers_are_kept_in_their_order():
    model, dense = net(5), net(5).state_dict()
    assert keep_layers_(model, [4, 0, 1]) == {"layers": [0, 1, 4]}
    state = model.state_dict()
    for new, old in enumerate([0, 1, 4]):
        pairs = layer_of(state, new), layer_of(dense, old)
        assert all(torch.equal(pairs[0][name], pairs[1][name]) for name in pairs[1])
    assert len(model.layers) == 3


def test_whole_chunks_go():
    model = share_layers_(net(8), 2)
    assert keep_layers_(model, "every-other") == {"layers": [0, 1, 4, 5]}
    assert shared_chunk(model.layers) == 2
    with refuses("keeps layer 0 of layers and not layer 1"):
        keep_layers_(model, [0, 2, 3])


@pytest.mark.parametrize("key", ["layers", "decoder.layers", "decoder"])
def test_a_mapping_names_the_stacks(key):
    model = nn.ModuleDict({"decoder": net(), "encoder": net()}) if "decoder" in key else net()
    kept = keep_layers_(model, {key: [1]})
    assert [len(stack) for stack in find_stacks(model).values()] in ([1, 4], [1])
    assert list(kept.values()) == [[1]]


def test_a_mapping_that_names_no_stack_is_refused():
    with refuses("names the stack 'decoder'; there are: layers"):
        keep_layers_(net(), {"decoder": [0]})


def test_a_stack_that_gets_layerdrop_keeps_its_mode():
    for training in (True, False):
        model = net().train(training)
        apply_structure(model, Plan.of({"stages": [], "structure": {"layerdrop": 0.5}}).structure)
        assert model.layers.training is training


def test_layerdrop_leaves_out_whole_chunks_and_only_in_training():
    stack = LayerStack(net(8).layers, chunk=2, p=0.5).train()
    torch.manual_seed(0)
    places = {layer: i for i, layer in enumerate(stack.eval())}
    assert len(places) == 8
    stack.train()
    counts = [0] * 4
    for _ in range(400):
        used = [places[layer] for layer in stack]
        assert used == sorted(used)
        assert {i // 2 for i in used} == {i // 2 for i in used if i % 2 == 0} == {i // 2 for i in used if i % 2}
        for i in used[::2]:
            counts[i // 2] += 1
    assert all(140 < n < 260 for n in counts), counts  # 200 expected, 10 a standard deviation


def test_a_stack_under_layerdrop_keeps_it_when_its_layers_come_to_share():
    model = net()
    model.layers = LayerStack(model.layers, p=0.3)
    share_layers_(model, 2)
    assert (model.layers.chunk, model.layers.p) == (2, 0.3)


def test_a_plans_structure_comes_in_order():
    model = net(8)
    structure = Plan.of({"structure": {"share_layers": 2, "keep_layers": "every-other", "layerdrop": 0.1}}).structure
    assert apply_structure(model, structure) == {"layers": [0, 1, 4, 5]}
    assert (len(model.layers), shared_chunk(model.layers)) == (4, 2)
    assert (model.layers.chunk, model.layers.p) == (2, 0.1)


def test_the_file_of_a_shared_and_pruned_network_of_ones_own(tmp_path):
    plan = {**PLAN, "structure": {"share_layers": 2, "keep_layers": [0, 1, 6, 7]}}
    model = quantize_(net(8), plan).eval()
    file = tmp_path / "model.safetensors"
    save(model, file, plan)
    back = load(file, into=net(8, seed=1))
    assert torch.equal(back(TOKENS), model(TOKENS))
    assert len(back.layers) == 4
    assert back.layers[1].fc._modules["weight"] is back.layers[0].fc._modules["weight"]
    assert back.layers[3].norm.weight is back.layers[2].norm.weight


def test_a_shared_network_is_written_to_half_the_bytes(tmp_path):
    whole = save(net(8), tmp_path / "whole.safetensors")
    shared = save(share_layers_(net(8), 2), tmp_path / "shared.safetensors")
    layer = sum(p.numel() for p in net(1).layers.parameters()) * 4
    assert whole - shared == pytest.approx(4 * layer, rel=0.2)


def test_a_shared_file_does_not_load_into_a_network_of_other_depth(tmp_path):
    save(share_layers_(net(4), 2), tmp_path / "shared.safetensors")
    with refuses("layers: the network does not have these 4 layers"):
        load(tmp_path / "shared.safetensors", into=net(6))


def test_a_trained_weight_in_codes_is_shared_as_well():
    model = share_layers_(net(), 2)
    quantize_(model, {"stages": [{"match": r"layers\..*", "scheme": "int8"}]})
    assert model.layers[3].fc._modules["weight"] is model.layers[2].fc._modules["weight"]
    assert len([w for w in find_weights(model) if w.aliases]) == 4
