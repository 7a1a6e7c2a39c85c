"""A training whose plan says `dense: fp16`: its log, its resumption, and the file of its checkpoint."""

import os
import shutil

import pytest
from finished import differences
from lm_fixture import FFN, ipq_flags, state_of

from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.checkpoints.keys import STAGES
from fairseq_quant_noise.cli.main import main


def flags(lab, runs, **plan):
    path = lab.plan({"stages": [FFN], **plan})
    return ["--finetune-from-model", runs.stock("plain").path, "--quantization-config-path", path, *ipq_flags("plain")]


@pytest.fixture(scope="module")
def trained(lab, runs):
    given = [*flags(lab, runs, dense="fp16"), "--save-interval-updates", 1]
    return given, lab.train(*given, updates=4)


def exported(tmp_path, run, *options):
    main(["export", "--path", str(run.path), "--out", str(tmp_path / "file.safetensors"), *options])
    return tmp_path / "file.safetensors"


def test_its_file_has_dense_tensors_in_fp16_and_scores_as_the_checkpoint(lab, trained, tmp_path):
    _, run = trained
    assert state_of(run.path)["extra_state"][STAGES]["plan"]["dense"] == {"dtype": "fp16"}
    path = exported(tmp_path, run)
    packed = read(path)
    assert packed.manifest.format_version == 7
    assert all(packed.is_halved(name) for name in packed.dense_names if packed.tensors[name].is_floating_point())
    assert lab.eval_lm(path) == pytest.approx(run.ppl, rel=1e-3)


def test_it_resumes_to_the_same_bits(lab, trained):
    given, whole = trained
    folder = lab.new()
    folder.mkdir()
    (before,) = whole.folder.glob("checkpoint_*_2.pt")
    shutil.copy(before, folder / "checkpoint_last.pt")
    assert differences(whole.path, lab.train(*given, updates=4, save=folder).path) == []


def test_the_choice_may_be_added_when_the_training_goes_on_and_when_it_is_exported(lab, runs, trained, tmp_path):
    _, half = trained
    full = lab.train(*flags(lab, runs), "--save-interval-updates", 1, updates=4)
    assert differences(full.path, half.path) != []  # the plan, in the checkpoint
    folder = lab.new()
    folder.mkdir()
    (before,) = full.folder.glob("checkpoint_*_2.pt")
    shutil.copy(before, folder / "checkpoint_last.pt")
    on = lab.train(*flags(lab, runs, dense="fp16"), updates=4, save=folder)
    assert read(exported(tmp_path, on)).manifest.format_version == 7
    sizes = [os.path.getsize(exported(tmp_path, full, *given)) for given in ([], ["--dense", "fp16"])]
    assert read(tmp_path / "file.safetensors").manifest.plan["dense"] == {"dtype": "fp16"}
    dense = sum(4 * tensor.numel() for tensor in map(read(exported(tmp_path, full)).dense, _names(tmp_path)))
    assert sizes[0] - sizes[1] == pytest.approx(dense / 2, abs=200)  # and the header's words
    assert os.path.getsize(exported(tmp_path, half)) == sizes[1]


def _names(tmp_path):
    return read(tmp_path / "file.safetensors").dense_names


def test_the_log_counts_it(lab, runs, trained):
    _, half = trained
    full = lab.train(*flags(lab, runs), updates=4)
    assert half.updates[-1]["ipq_mib"] < full.updates[-1]["ipq_mib"]
