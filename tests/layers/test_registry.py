"""A format is one class: what a new one says of itself takes it through plan, model, file, checks and back to dense."""

import shutil
from pathlib import Path

import pytest
import torch
from packed_files import damaged, forge
from sign_format import MAGNITUDE, SignWeight
from toys import TOKENS, ZOO_PLAN, python, quiet, refuses, zoo

import fairseq_quant_noise
from fairseq_quant_noise import load
from fairseq_quant_noise.artifact import dense_state, pack, read, write
from fairseq_quant_noise.artifact.codebooks import codebook_use
from fairseq_quant_noise.artifact.inspection import inspection
from fairseq_quant_noise.layers import IntWeight, LatentIntWeight, PQWeight, adopt_quantized, quantized_weights
from fairseq_quant_noise.layers.registry import FORMATS, Held, file_formats, plan_formats, register, weights_in
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.plan.rules import StageRule
from fairseq_quant_noise.quantization.quantize import quantize_, quantized_values
from fairseq_quant_noise.quantization.table import make_table, model_bytes
from fairseq_quant_noise.quantization.targets import resolve_stages
from fairseq_quant_noise.structure.state import share_state

FORMATS.pop("sign", None)  # other tests, in the same process, know nothing of it
PLAN = {"stages": [{"match": "emb", "scheme": "sign"}, {"match": "conv", "scheme": "sign"}, ZOO_PLAN["stages"][0]]}


@pytest.fixture(autouse=True)
def _sign(monkeypatch):
    monkeypatch.setitem(FORMATS, "sign", SignWeight)


@pytest.fixture
def network():
    return quantize_(zoo(), PLAN, progress=quiet).eval()


@pytest.fixture
def file(network, tmp_path):
    path = tmp_path / "sign.safetensors"
    write(pack(network, Plan.of(PLAN)), path)
    return path


def signs(weight):
    return weight.sign() * weight.abs().flatten(1).mean(1).view(-1, *[1] * (weight.dim() - 1))


def test_a_plan_makes_weights_of_it(network):
    dense = zoo()
    assert {name: type(w) for name, w in quantized_weights(network).items() if "attn" not in name} == {
        "emb": SignWeight,
        "conv": SignWeight,
        "fc": PQWeight,
    }
    for name in ("emb", "conv"):
        expected = signs(dense.get_submodule(name).weight)
        assert torch.allclose(network.get_submodule(name).weight, expected), name
    assert network.out._modules["weight"] is network.emb._modules["weight"]
    targets = resolve_stages(Plan.of(PLAN), dense)
    values = dict(zip((t.weight.name for t in targets), quantized_values(targets, seed=0, progress=quiet), strict=True))
    assert torch.equal(values["emb"][1], network.emb.weight)


def test_the_plans_table_counts_its_size(network):
    table = make_table(zoo(), resolve_stages(Plan.of(PLAN), zoo()))
    rows = {row.name: (row.scheme, row.bytes) for row in table.rows}
    assert rows["emb.weight"] == ("sign", 16 * 8 / 8)
    assert rows["conv.weight"] == ("sign", 8 * 9 / 8)
    assert model_bytes(network) == pytest.approx((table.paper_bytes, table.dense_bytes))


def test_a_file_holds_it_and_gives_it_back(network, file):
    packed = read(file)
    assert packed.tensors["emb.weight.codes"].shape == (16 * 8 // 8,)
    assert packed.manifest.tensors["emb.weight"].to_dict() == {"scheme": "sign", "shape": (16, 8)}
    row = next(row for row in inspection(file, packed)["tensors"] if row["name"] == "emb.weight")
    assert (row["scheme"], row["bytes"], row["paper_bytes"]) == ("sign", 16 * 8 / 8 + 16 * 4, 16 * 8 / 8)
    use = {use.tensor: use for use in codebook_use(packed)}["emb.weight"]
    assert (use.codes, use.centroids, use.capacity) == (16 * 8, 2, 1.0)
    loaded = load(file, into=zoo(1))
    assert torch.equal(loaded(TOKENS), network(TOKENS))
    assert loaded.out._modules["weight"] is loaded.emb._modules["weight"]


def test_a_state_is_loaded_by_a_dense_model_and_by_one_of_the_format(network):
    state = network.state_dict()
    model = zoo(1).eval()
    assert {"emb", "conv"} < {*adopt_quantized(model, state)}
    model.load_state_dict(state)
    assert torch.equal(model(TOKENS), network(TOKENS))
    assert adopt_quantized(model, state) == []
    with refuses("emb: signs of shape .3, 8. do not fit"):
        adopt_quantized(zoo(), state | {"emb.weight.codes": torch.zeros(3, 8, dtype=torch.uint8)})


def test_it_becomes_dense_again(network, file):
    packed = read(file)
    dense = dense_state(packed.state_dict(), {n: entry.shape for n, entry in packed.manifest.tensors.items()})
    assert dense["emb.weight"].data_ptr() == dense["out.weight"].data_ptr()
    model = zoo(1).eval()
    model.load_state_dict(dense)
    assert torch.allclose(model(TOKENS), network(TOKENS), atol=1e-6)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.full((16,), torch.inf), "tensor emb.weight: damaged .a magnitude that is not finite"),
        (torch.ones(15), "tensor emb.weight: damaged .signs' or magnitudes' shape"),
        (torch.ones(16).half(), "tensor emb.weight: damaged .its parts are not codes .*magnitude .torch.float32"),
    ],
)
def test_a_damaged_file_is_refused_in_its_words(network, file, tensor, message):
    forge(file, pack(network), **{f"emb.weight.{MAGNITUDE}": tensor})
    with damaged(message):
        read(file)


def test_a_file_that_does_not_list_it_is_refused(network, file):
    codes, magnitude = torch.zeros(1, dtype=torch.uint8), torch.ones(1)
    forge(file, pack(network), **{"x.codes": codes, f"x.{MAGNITUDE}": magnitude})
    with damaged("is in the file in two forms, or is not listed in its manifest"):
        read(file)


def test_layers_of_it_that_differ_are_not_shared():
    state = {f"layers.{i}.fc.weight.codes": torch.full((2, 2), i, dtype=torch.uint8) for i in range(2)}
    state |= {f"layers.{i}.fc.weight.{MAGNITUDE}": torch.ones(2) for i in range(2)}
    with refuses("layers.0.fc.weight.codes: is quantized; share the layers of the dense checkpoint"):
        share_state(state, 2)


def test_a_file_in_layers_registers_its_format(tmp_path):
    """No other file of the package is touched."""
    package = tmp_path / "fairseq_quant_noise"
    shutil.copytree(Path(fairseq_quant_noise.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(__file__).parents[1] / "support/sign_format.py", package / "layers/sign.py")
    script = (
        "import sys, torch; sys.path.insert(0, '.'); from torch import nn; from fairseq_quant_noise import quantize_; "
        "model = quantize_(nn.Sequential(nn.Linear(4, 4)), {'stages': [{'match': '.*', 'scheme': 'sign'}]}); "
        "print(type(model[0]._modules['weight']).__module__)"
    )
    done = python("-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fairseq_quant_noise.layers.sign"


# The formats that there are.


def test_each_scheme_has_a_format_for_training_and_one_for_files():
    assert {name: FORMATS[name] for name in ("pq", "intN", "intN latent")} == {
        "pq": PQWeight,
        "intN": IntWeight,
        "intN latent": LatentIntWeight,
    }
    assert plan_formats().keys() == file_formats().keys() == {"pq", *(f"int{n}" for n in range(2, 9)), "sign"}
    assert (plan_formats()["int8"], file_formats()["int8"]) == (LatentIntWeight, IntWeight)
    with refuses("unknown scheme 'int9'; known schemes: pq, int2, int3, int4, int5, int6, int7, int8, sign"):
        StageRule(".*", scheme="int9")


@pytest.mark.parametrize("change", [{}, {"plan_schemes": ()}, {"plan_schemes": (), "file_schemes": ()}])
def test_a_format_that_cannot_be_told_from_another_is_refused(change):
    with pytest.raises(ValueError, match="format other: cannot be told from sign"):
        register("other")(type("Other", (SignWeight,), change))
    assert "other" not in FORMATS


def test_a_states_weights_are_told_apart_by_their_entries():
    plan = {"stages": [{"match": "emb", "scheme": "int8"}, {"match": "fc", "block_size": 4}]}
    model = quantize_(zoo(), plan, progress=quiet)
    found = weights_in(model.state_dict())
    kinds = {name: held.format for name, held in found.items() if isinstance(held, Held)}
    assert kinds == {"emb.weight": LatentIntWeight, "out.weight": LatentIntWeight, "fc.weight": PQWeight}
    assert {*found} == {*zoo().state_dict()}
    assert {name: tuple(held.shape) for name, held in found.items()} == {
        name: tuple(tensor.shape) for name, tensor in zoo().state_dict().items()
    }
    filed = weights_in(pack(model).state_dict())
    assert {name: held.format for name, held in filed.items() if isinstance(held, Held)} == {
        **dict.fromkeys(("emb.weight", "out.weight"), IntWeight),
        "fc.weight": PQWeight,
    }
