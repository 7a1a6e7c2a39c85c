"""A model as tensors and manifest, and back to the state that a model loads."""

import math

import pytest
import torch
from packed_files import packed_zoo, quantized_zoo
from torch import nn
from toys import INT_PLANS, TOKENS, ZOO_PLAN, adopting, quiet, zoo

from fairseq_quant_noise.artifact import pack, read, write
from fairseq_quant_noise.artifact.inspection import inspection
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.quantization.quantize import quantize_
from fairseq_quant_noise.quantization.table import make_table
from fairseq_quant_noise.quantization.targets import resolve_stages


def reload(packed, model):
    """`model` with the packed state, strictly."""
    return adopting(model, packed.state_dict()).eval()


def quantize(model, match=".*", d=4):
    return quantize_(model, {"stages": [{"match": match, "block_size": d}]}, progress=quiet).eval()


def test_codes_are_packed_centroids_fp16_and_the_rest_as_it_was():
    tensors = packed_zoo().tensors
    assert (tensors["fc.weight.codes"].dtype, tensors["fc.weight.codes"].shape) == (torch.uint8, (4,))
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


def test_the_manifest_says_what_is_in_n_bits_and_how():
    tensors = packed_zoo(plan="mixed").manifest.tensors
    emb, fc, q = (tensors[f"{name}.weight"] for name in ("emb", "fc", "attn.q_proj"))
    assert (emb.scheme, emb.shape, emb.channels, emb.block_size) == ("int8", (16, 8), 16, None)
    assert (fc.scheme, fc.channels, fc.code_bits) == ("int4", 1, 4)
    assert (q.scheme, q.centroid_bits, q.channels, q.code_bits) == ("pq", 8, 1, 2)


@pytest.mark.parametrize(("plan", "bits"), [("int8", 8), ("int4 by channel", 4), ("int3 by histogram", 3)])
def test_a_number_of_n_bits_takes_n_bits_and_a_scale_8_bytes(plan, bits):
    packed = packed_zoo(plan=plan)
    for name, entry in packed.manifest.tensors.items():
        n = math.prod(entry.shape)
        assert packed.tensor_bytes(name) == math.ceil(n * bits / 8) + 8 * entry.channels
        assert entry.channels == (entry.shape[0] if "channel" in plan else 1)


def test_what_is_trained_is_not_in_the_file():
    names = [*packed_zoo(plan="int8").tensors]
    assert {name.rpartition(".")[2] for name in names if name.startswith("fc.weight")} == {"codes", "affine"}


def test_ranges_of_inputs_are_in_the_manifest_alone():
    packed = packed_zoo(plan="inputs")
    assert packed.manifest.inputs.keys() == {"fc", "conv", "out"}
    assert not any("input_quantizer" in name for name in packed.tensors)


@pytest.mark.upstream(8)
@pytest.mark.parametrize("plan", ["pq", "int8"])
def test_a_tied_copy_is_recorded_and_not_stored(plan):
    packed = packed_zoo(plan=plan)
    assert packed.manifest.ties == {"out.weight": "emb.weight"}
    assert not any(name.startswith("out.") for name in packed.tensors)


def test_the_state_of_the_model_comes_back_with_its_ties():
    model = quantized_zoo()
    state = packed_zoo().state_dict()
    assert set(state) == set(model.state_dict())
    assert state["out.weight.codes"] is state["emb.weight.codes"]
    assert state["fc.weight.centroids"].dtype == torch.float32
    assert torch.equal(reload(packed_zoo(), zoo(1))(TOKENS), model(TOKENS))


@pytest.mark.parametrize("plan", INT_PLANS)
def test_codes_of_every_scheme_come_back_with_their_ties(plan):
    model, state = quantized_zoo(plan), packed_zoo(plan=plan).state_dict()
    assert state["out.weight.codes"] is state["emb.weight.codes"]
    found = reload(packed_zoo(plan=plan), zoo(1))
    torch.testing.assert_close(found(TOKENS), model(TOKENS), rtol=1e-6, atol=1e-7)
    assert found.out._modules["weight"] is found.emb._modules["weight"]


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
    assert packed.tensor_bytes("fc.weight") == 16 * 2 // 8 + 4 * 4 * 2  # codes of two bits
    assert packed.tensor_bytes("fc.bias") == 32


def test_the_papers_accounting_of_the_file_is_that_of_the_dry_run_and_the_buffers(tmp_path):
    model = zoo()
    table = make_table(model, resolve_stages(Plan.of(ZOO_PLAN), model))
    (tmp_path / "file").write_bytes(b"x")
    info = inspection(tmp_path / "file", packed_zoo())
    buffers = 4 * sum(b.numel() for b in model.buffers())
    assert info["paper_bytes"] == pytest.approx(table.paper_bytes + buffers)
    assert info["dense_bytes"] == table.dense_bytes + buffers


def test_the_inspection_says_the_entropy_of_the_codes(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    packed = packed_zoo()
    info = inspection(tmp_path / "file", packed)
    rows = {row["name"]: row for row in info["tensors"]}
    codes = packed.state_dict()["fc.weight.codes"].flatten()
    shares = torch.bincount(codes).double() / len(codes)
    expected = -(shares[shares > 0] * shares[shares > 0].log2()).sum()
    assert rows["fc.weight"]["entropy"] == pytest.approx(float(expected))
    assert rows["fc.weight"]["code_bits"] == 2
    assert rows["fc.bias"]["entropy"] is rows["fc.bias"]["code_bits"] is None
    assert 0 < info["entropy_bytes"] <= info["code_bytes"]
    in_codes = [row for row in rows.values() if row["entropy"] is not None]
    numbers = [packed.manifest.tensors[row["name"]].n_codes for row in in_codes]
    total = sum(row["entropy"] * n for row, n in zip(in_codes, numbers, strict=True))
    assert info["entropy_bytes"] == pytest.approx(total / 8)
