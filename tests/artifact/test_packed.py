"""A model as tensors and manifest, and back to the state that a model loads."""

import pytest
import torch
from packed_files import packed_zoo, quantized_zoo
from torch import nn
from toys import TOKENS, ZOO_PLAN, quiet, zoo

from fairseq_quant_noise.artifact import pack, read, write
from fairseq_quant_noise.cli_print import inspection
from fairseq_quant_noise.layers import adopt_quantized
from fairseq_quant_noise.plan import Plan
from fairseq_quant_noise.quantize import quantize_
from fairseq_quant_noise.table import make_table, resolve_stages


def reload(packed, model):
    """`model` with the packed state, strictly."""
    state = packed.state_dict()
    adopt_quantized(model, state)
    model.load_state_dict(state)
    return model.eval()


def quantize(model, match=".*", d=4):
    return quantize_(model, {"stages": [{"match": match, "block_size": d}]}, progress=quiet).eval()


def test_codes_are_bytes_centroids_fp16_and_the_rest_as_it_was():
    tensors = packed_zoo().tensors
    assert tensors["fc.weight.codes"].dtype == torch.uint8
    assert tensors["fc.weight.centroids"].dtype == torch.float16
    assert tensors["fc.bias"].dtype == torch.float32
    assert "fc.weight" not in tensors
    assert torch.equal(tensors["scale"], torch.ones(1))


def test_the_manifest_says_what_is_quantized_and_how():
    manifest = packed_zoo().manifest
    conv = manifest.tensors["conv.weight"]
    assert (conv.scheme, conv.shape, conv.block_size, conv.n_centroids) == ("pq", (8, 1, 3, 3), 9, 2)
    assert len(manifest.tensors) == 7
    assert Plan.of(manifest.plan) == Plan.of(ZOO_PLAN)
    assert manifest.model == {}


@pytest.mark.upstream(8)
def test_a_tied_copy_is_recorded_and_not_stored():
    packed = packed_zoo()
    assert packed.manifest.ties == {"out.weight": "emb.weight"}
    assert not any(name.startswith("out.") for name in packed.tensors)


def test_the_state_of_the_model_comes_back_with_its_ties():
    model = quantized_zoo()
    state = packed_zoo().state_dict()
    assert set(state) == set(model.state_dict())
    assert state["out.weight.codes"] is state["emb.weight.codes"]
    assert state["fc.weight.centroids"].dtype == torch.float32
    assert torch.equal(reload(packed_zoo(), zoo(1))(TOKENS), model(TOKENS))


def test_a_dense_model_comes_back_as_it_was():
    model = zoo().eval()
    packed = pack(model)
    assert (packed.manifest.tensors, packed.manifest.plan) == ({}, {})
    assert packed.manifest.ties == {"out.weight": "emb.weight"}
    assert torch.equal(reload(packed, zoo(1))(TOKENS), model(TOKENS))


def test_the_model_is_neither_changed_nor_shared():
    model = quantized_zoo()
    before = model(TOKENS)
    for tensor in pack(model).tensors.values():
        tensor.zero_()
    assert torch.equal(model(TOKENS), before)


def test_a_module_used_under_two_names_is_stored_once():
    linear = nn.Linear(8, 32)
    model = quantize(nn.ModuleDict({"a": linear, "b": linear}))
    packed = pack(model)
    assert packed.manifest.ties == {"b.weight": "a.weight", "b.bias": "a.bias"}
    twin = nn.Linear(8, 32)
    reload(packed, nn.ModuleDict({"a": twin, "b": twin}))
    assert torch.equal(twin.weight, linear.weight)


class Shares(nn.Module):
    """Any module that holds a weight of another."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight


def early_tie():
    linear = nn.Linear(8, 32)
    return nn.ModuleDict({"early": Shares(linear.weight), "fc": linear})


@pytest.mark.upstream(8)
def test_a_weight_whose_tied_copy_comes_first_is_stored_once():
    packed = pack(quantize(early_tie(), "fc"))
    assert [t.dtype for t in packed.tensors.values()].count(torch.uint8) == 1
    assert len(packed.manifest.ties) == 1


@pytest.mark.upstream(8)
def test_a_weight_whose_tied_copy_comes_first_comes_back(tmp_path):
    model = quantize(early_tie(), "fc")
    write(pack(model), tmp_path / "file")
    found = reload(read(tmp_path / "file"), early_tie())
    assert torch.equal(found["fc"].weight, model["fc"].weight)
    assert found["early"]._modules["weight"] is found["fc"]._modules["weight"]


def test_a_model_that_is_one_layer_comes_back():
    model = quantize(nn.Linear(8, 64))
    packed = pack(model)
    assert set(packed.tensors) == {"weight.codes", "weight.centroids", "bias"}
    assert torch.equal(reload(packed, nn.Linear(8, 64)).weight, model.weight)


def test_names_that_end_in_codes_or_centroids_are_ordinary_where_nothing_is_quantized():
    model = nn.ParameterDict({"codes": torch.ones(2), "centroids": torch.zeros(3)})
    state = pack(model).state_dict()
    assert torch.equal(state["codes"], torch.ones(2))
    assert torch.equal(state["centroids"], torch.zeros(3))


def test_the_bytes_of_a_tensor_are_those_in_the_file():
    packed = packed_zoo()
    assert packed.tensor_bytes("fc.weight") == 16 + 4 * 4 * 2
    assert packed.tensor_bytes("fc.bias") == 32


def test_the_papers_accounting_of_the_file_is_that_of_the_dry_run_and_the_buffers(tmp_path):
    model = zoo()
    table = make_table(model, resolve_stages(Plan.of(ZOO_PLAN), model))
    (tmp_path / "file").write_bytes(b"x")
    info = inspection(tmp_path / "file", packed_zoo())
    buffers = 4 * sum(b.numel() for b in model.buffers())
    assert info["paper_bytes"] == pytest.approx(table.paper_bytes + buffers)
    assert info["dense_bytes"] == table.dense_bytes + buffers
