"""What cannot be exported is refused by name; that needs no onnx."""

import sys
from dataclasses import replace

import pytest
from exported import ROBERTA, TRANSLATION, packed_file
from toys import ZOO_PLAN, quiet, refuses, zoo

from fairseq_quant_noise import quantize_, save
from fairseq_quant_noise.artifact import Packed, read
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.deployment import model as module
from fairseq_quant_noise.deployment import onnx_model
from fairseq_quant_noise.deployment.parts import part_of


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return packed_file(tmp_path_factory.mktemp("lm"))


def test_without_onnx_a_line_says_how_to_install_it(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(SystemExit) as end:
        main(["export-onnx", str(file), "--out", str(tmp_path / "model.onnx")])
    line = "an ONNX model needs onnx, which is not installed; run: pip install 'fairseq-quant-noise[onnx]'"
    assert (end.value.code, capsys.readouterr().err) == (2, f"error: {line}\n")
    assert not (tmp_path / "model.onnx").exists()


def test_a_network_of_ones_own_is_refused(tmp_path):
    save(quantize_(zoo(), ZOO_PLAN, progress=quiet), tmp_path / "own.safetensors")
    with refuses(r"own\.safetensors: holds a network of your own; only files of fairseq's models"):
        onnx_model(tmp_path / "own.safetensors", read(tmp_path / "own.safetensors"))


def test_a_tensor_in_another_format_is_refused_by_name(file):
    packed = read(file)
    name, entry = next(iter(packed.manifest.tensors.items()))
    tensors = {**packed.manifest.tensors, name: replace(entry, scheme="sign")}
    with refuses(f"^x: {name}: scheme sign has no form in ONNX"):
        onnx_model("x", Packed(packed.tensors, replace(packed.manifest, tensors=tensors)))


def test_weights_that_one_model_cannot_hold_are_refused(file, monkeypatch):
    monkeypatch.setattr(module, "_LARGEST", 1_000)
    with refuses("^x: its [0-9,]+ bytes of weights do not fit an ONNX model of 1,000 bytes"):
        onnx_model("x", read(file))


@pytest.mark.parametrize(
    ("network", "part", "cure"),
    [
        ("transformer_lm", "encoder", "give no --part or --part step"),
        ("roberta", "nli", "give no --part or --part mnli or --part other"),
        ("transformer", None, "give --part encoder or --part decoder or --part source or --part step"),
    ],
)
def test_a_part_that_the_network_does_not_have_is_refused_with_those_that_it_has(network, part, cure, tmp_path):
    options = {"roberta": {"options": ROBERTA}, "transformer": {"options": TRANSLATION}}.get(network, {})
    path = packed_file(tmp_path, network, **options)
    given = "no --part" if part is None else f"--part {part}"
    with refuses(rf"model\.safetensors: {given} does not fit this network; {cure}$"):
        onnx_model(path, read(path), part)


def test_a_network_of_another_kind_is_refused_by_its_name():
    with refuses("^a Zoo cannot be exported to ONNX"):
        part_of(zoo(), None)
