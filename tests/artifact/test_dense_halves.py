"""Dense tensors in fp16: what is stored so, what it stands for, and what a file says of it."""

import json

import pytest
import torch
from packed_files import damaged, forge, packed_zoo, quantized_zoo
from toys import TOKENS, quiet, refuses, zoo

from fairseq_quant_noise import load, quantize_, save
from fairseq_quant_noise.artifact import pack, read, write
from fairseq_quant_noise.artifact.inspection import inspection
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.plan.plan import Plan

HALF = "dense in fp16"
BIG, TINY = "1.running_var", "4.running_var"
PLAN = {"stages": [{"match": "0|3", "block_size": 9, "n_centroids": 8}], "dense": "fp16"}


def images():
    """Two convolutions with batch statistics that fp16 has no numbers for: one too large, one nearly zero."""
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(
        *(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Linear(4, 2))
    )
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model[1].running_mean.normal_()
    model[1].running_var[3], model[4].running_var[5] = 1e5, 1e-9
    return model.eval()


def test_dense_tensors_take_half_the_bytes_and_codes_stay_as_they_were():
    full, half = packed_zoo(), packed_zoo(plan=HALF)
    assert (full.manifest.format_version, half.manifest.format_version) == (3, 7)
    assert full.dense_names == half.dense_names
    for name in full.dense_names:
        assert half.tensor_bytes(name) * 2 == full.tensor_bytes(name)
    for name in full.manifest.tensors:
        assert all(torch.equal(full.tensors[part], half.tensors[part]) for part in full.parts(name))


def test_the_network_has_them_in_fp32(tmp_path):
    model = quantized_zoo()
    packed = packed_zoo(plan=HALF)
    write(packed, tmp_path / "model.safetensors")
    back = load(tmp_path / "model.safetensors", into=zoo(1))
    state = back.state_dict()
    for name in packed.dense_names:
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], model.state_dict()[name].half().float())
    torch.testing.assert_close(back(TOKENS), model(TOKENS), rtol=0, atol=2e-3)


def test_it_packs_to_itself_again(tmp_path):
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    write(packed_zoo(plan=HALF), first)
    save(load(first, into=zoo(1)), second, read(first).manifest.plan)
    assert first.read_bytes() == second.read_bytes()


def test_a_tensor_whose_values_do_not_survive_stays_as_it_was(tmp_path):
    model = quantize_(images(), PLAN, calibration=None, progress=quiet)
    packed = pack(model, Plan.of(PLAN))
    kept = {name for name in packed.dense_names if packed.tensors[name].dtype == torch.float32}
    assert kept == {BIG, TINY}
    assert {name for name in packed.dense_names if packed.is_halved(name)} == {
        *(f"{i}.{key}" for i in (1, 4) for key in ("weight", "bias", "running_mean")),
        *("0.bias", "3.bias", "5.weight", "5.bias"),
    }
    write(packed, tmp_path / "model.safetensors")
    back = load(tmp_path / "model.safetensors", into=images())
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(back[1].running_var, model[1].running_var)
    torch.testing.assert_close(back(x), model(x), rtol=5e-3, atol=5e-3)


def test_a_file_without_any_has_the_version_and_the_bytes_of_before():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2, affine=False))
    model[0].running_mean.fill_(1e6)
    model[0].running_var.fill_(1e6)
    packed = pack(model, Plan.of({"dense": "fp16"}))
    assert packed.manifest.format_version == 3
    assert "dense" not in json.loads(packed.manifest.to_json())


def test_a_network_in_fp16_stays_one(tmp_path):
    model = torch.nn.Linear(3, 2).half()
    save(model, tmp_path / "model.safetensors", {"dense": "fp16"})
    packed = read(tmp_path / "model.safetensors")
    assert packed.manifest.format_version == 3
    assert packed.state_dict()["weight"].dtype == torch.float16


def test_save_takes_it_beside_a_plan_or_without_one(tmp_path):
    path = tmp_path / "model.safetensors"
    save(zoo(), path, dense="fp16")
    assert read(path).manifest.plan["dense"] == {"dtype": "fp16"}
    assert read(path).manifest.dense == "F32"
    save(zoo(), path, {"dense": "fp16"}, dense="fp32")
    assert "dense" not in read(path).manifest.plan
    assert read(path).manifest.dense == ""
    with refuses("dense: unknown dtype 'fp8'; known: fp32, fp16"):
        save(zoo(), path, dense="fp8")


def test_inspect_says_which(tmp_path, capsys):
    write(pack(quantize_(images(), PLAN, progress=quiet), Plan.of(PLAN)), tmp_path / "model.safetensors")
    packed = read(tmp_path / "model.safetensors")
    rows = {row["name"]: row for row in inspection(tmp_path / "model.safetensors", packed)["tensors"]}
    assert (rows["1.bias"]["dense_bits"], rows[BIG]["dense_bits"], rows["0.weight"]["dense_bits"]) == (16, 32, None)
    assert (rows["1.bias"]["bytes"], rows["1.bias"]["paper_bytes"]) == (16, 16)
    assert rows[BIG]["bytes"] == rows[BIG]["paper_bytes"] == 32
    main(["inspect", str(tmp_path / "model.safetensors")])
    printed = capsys.readouterr().out
    assert printed.count("dense, fp16") == 10


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(dense="F16"),
        lambda m: m.update(dense=["F32"]),
        lambda m: m.update(dense=None),
        lambda m: m.update(dense=""),
        lambda m: m.pop("dense"),
        lambda m: m.update(format_version=3),
    ],
    ids=["another type", "a list", "null", "nothing", "left out", "in a version without"],
)
def test_what_no_version_writes_is_refused(tmp_path, edit):
    path = forge(tmp_path / "model.safetensors", packed_zoo(plan=HALF), edit)
    with damaged("manifest is damaged"):
        read(path)


def test_a_version_before_it_has_no_such_key(tmp_path):
    path = forge(tmp_path / "model.safetensors", packed_zoo(), lambda m: m.update(dense="F32"))
    with damaged("version 3, which such a file does not have"):
        read(path)
