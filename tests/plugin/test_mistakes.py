"""What users do wrong, by the command line: one line that names the thing and the cure, and nothing is lost."""

import contextlib
import errno
import functools
import os
import resource
import shutil

import fairseq.distributed.utils
import fairseq_cli.eval_lm
import fairseq_cli.train
import pytest
import safetensors.torch
import torch
from lm_fixture import FFN, PLANS, WORD_VECTORS, fairseqs_own_noise, one_error, split, state_of
from toys import refuses

from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.plugin.mistakes import as_user_errors, in_a_line

WEIGHT, BIAS = "decoder.layers.0.fc1.weight", "decoder.layers.1.fc2.bias"


def fails(capsys, line, code=2):
    """The message of a verb that ends with this exit code."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(list(map(str, line)))
    said = capsys.readouterr()
    message = said.err.splitlines()[-1]
    assert (end.value.code, message[:7], "Traceback" in said.err) == (code, "error: ", False), said.err
    return message.removeprefix("error: ")


@pytest.fixture
def place(lab):
    """A folder with a file `out.safetensors` that is worth something; nothing else may be in it afterwards."""
    folder = lab.new("place")
    folder.mkdir()
    (folder / "out.safetensors").write_text("what was there")
    yield folder / "out.safetensors"
    assert [path.name for path in folder.iterdir()] == ["out.safetensors"]
    assert (folder / "out.safetensors").read_text() == "what was there"


@pytest.fixture
def quantize(lab, runs, place, capsys):
    """The message of `quantize` with a mistake in it; what is not given is right."""

    def run(plan=PLANS["plain"], path=None, out=place, options=()):
        plan = plan if isinstance(plan, os.PathLike) else lab.plan(plan)
        path = path or runs.stock("plain").path
        return fails(capsys, ["quantize", "--path", path, "--plan", plan, "--out", out, *options])

    return run


# Weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [WEIGHT, BIAS])
def test_a_number_that_is_none_is_named_wherever_it_is(lab, runs, quantize, name, value):
    state = state_of(runs.stock("plain").path)
    state["model"][name].view(-1)[3] = value
    path = lab.checkpoint(state)
    assert quantize(path=path) == (
        f"checkpoint {path}: {name} holds NaN or infinity; give a checkpoint from before the training diverged"
    )


def test_a_weight_beyond_fp16_centroids_is_named(lab, runs, quantize):
    state = state_of(runs.stock("plain").path)
    state["model"][WEIGHT].view(-1)[3] = 7e4
    assert quantize(path=lab.checkpoint(state)).startswith("decoder.layers.0.fc1: a weight of 7e+04 does not fit fp16")


WRONG_PLANS = {
    "a block that does not divide": ([{**FFN, "block_size": 7}], "decoder.layers.0.fc1: blocks of 7 do not divide"),
    "an unknown key": ([{**FFN, "blocksize": 8}], "stages[0]: unknown key 'blocksize'; known keys: match"),
    "a bad expression": ([{"match": "(fc"}], "stage rule '(fc': not a regular expression"),
    "rules that overlap": ([FFN, {"match": ".*"}], "decoder.layers.0.fc1: matched by two stages"),
    "a rule for nothing": ([{"match": "fc1"}], "rule 'fc1' matches no weight of this model"),
}


@pytest.mark.parametrize("name", WRONG_PLANS)
def test_a_plan_that_does_not_fit_says_which_rule(quantize, name):
    stages, message = WRONG_PLANS[name]
    assert message in quantize({"stages": stages})


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan"), "x", True])
def test_a_probability_outside_0_to_1_is_refused(quantize, p):
    assert f"p is {p!r}; give a probability from 0 to 1" in quantize({"noise": [{"match": ".*", "p": p}]})


def test_too_few_vectors_get_fewer_centroids_and_not_an_error(lab, runs, capsys):
    """64 vectors of 32 numbers: 16 centroids, four vectors for each."""
    plan = lab.plan({"stages": [{"match": r"decoder\.layers\.0\.fc1", "block_size": 32, "n_centroids": 256}]})
    out = lab.new("few.safetensors")
    main(["quantize", "--path", str(runs.stock("plain").path), "--plan", plan, "--out", str(out)])
    assert " K 16 " in capsys.readouterr().err


# Paths


def test_the_file_that_is_read_is_not_written_over(lab, runs, capsys):
    """Under the same name or another; a checkpoint of days may be its only copy."""
    path = lab.new("only.pt")
    shutil.copy(runs.stock("plain").path, path)
    link, plan = lab.new("link"), lab.new("plan.yaml")
    link.symlink_to(path)
    shutil.copy(lab.plan(PLANS["plain"]), plan)
    packed = lab.new("only.safetensors")
    shutil.copy(runs.packed("plain"), packed)
    before = [file.read_bytes() for file in (path, plan, packed)]
    quantize = ["quantize", "--path", path, "--plan", plan, "--out"]
    lines = [[*quantize, path], [*quantize, link], [*quantize, plan], ["to-dense", packed, "--out", packed]]
    lines += [["prune", "--path", path, "--keep", "0", "--out", link], ["export", "--path", path, "--out", path]]
    for line in lines:
        assert fails(capsys, line) == (
            f"--out {line[-1]}: is a file that is read, and would be lost; choose another name"
        )
    assert [file.read_bytes() for file in (path, plan, packed)] == before


def test_an_output_that_cannot_be_is_said_before_any_work(lab, quantize, monkeypatch):
    assert quantize(out="") == "--out '': is a folder; give the name of a file in it"
    assert quantize(out=lab.folder) == f"--out {lab.folder}: is a folder; give the name of a file in it"
    assert "does not exist; make it first" in quantize(out="/nowhere/x.safetensors")
    assert quantize(out="model.pt").endswith("call it model.safetensors")
    monkeypatch.setattr(os, "access", lambda folder, how: False)
    assert "cannot be written; choose another place" in quantize()


@contextlib.contextmanager
def small_disk(size):
    """No file can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_where_the_disk_ends_the_old_file_stays(lab, runs, place, capsys):
    plan, path = lab.plan(PLANS["plain"]), runs.stock("plain").path
    lines = {
        "quantize": ["quantize", "--path", path, "--plan", plan],
        "export": ["export", "--path", runs.ipq("plain").path],
        "to-dense": ["to-dense", runs.packed("plain")],
        "prune": ["prune", "--path", path, "--keep", "0"],
        "share": ["share", "--path", path, "--share-layers", "2"],
    }
    for line in lines.values():
        with small_disk(4096):
            assert fails(capsys, [*line, "--out", place]) == (
                f"cannot write {place}: File too large; choose another place"
            )


KINDS = {
    "empty": (b"", 3, "is empty; copy"),
    "text": (b"once upon a time\n", 3, "not a whole"),
    "page": (b"<!DOCTYPE html><html></html>", 2, "a web page, not a checkpoint; download it"),
    "other program's": (safetensors.torch.save({"w": torch.ones(2)}), 2, "a safetensors file of another program"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_named_by_each_verb(lab, capsys, kind):
    content, code, message = KINDS[kind]
    path, plan, out = lab.new("file.bin"), lab.plan(PLANS["plain"]), lab.new("out")
    path.write_bytes(content)
    for line in (
        ["plan", "--path", path, "--plan", plan],
        ["quantize", "--path", path, "--plan", plan, "--out", out],
        ["export", "--path", path, "--out", out],
        ["prune", "--path", path, "--keep", "0", "--out", out],
        ["to-dense", path, "--out", out],
    ):
        said = fails(capsys, line, code)
        assert message in said
        assert str(path) in said
    for verb in ("inspect", "verify"):
        assert str(path) in fails(capsys, [verb, path], 3)
    assert not out.exists()


def test_checkpoints_and_packed_files_are_told_apart(lab, runs, capsys):
    packed, dense, plan = runs.packed("plain"), runs.stock("plain").path, lab.plan(PLANS["plain"])
    assert "a packed file; give the checkpoint that it was made of" in fails(
        capsys, ["plan", "--path", packed, "--plan", plan]
    )
    assert "a PyTorch file, not a packed one; `fairseq-quant-noise quantize`" in fails(capsys, ["inspect", dense], 3)


# Data


@pytest.fixture(scope="module")
def other_words(lab):
    """The data, with a dictionary of 50 words."""
    folder = lab.new("other-words")
    shutil.copytree(lab.data, folder)
    lines = (folder / "dict.txt").read_text().splitlines()
    (folder / "dict.txt").write_text("\n".join(lines[:50]) + "\n")
    return folder


def evaluate(lab, data, path):
    cfg = lab._eval_config().copy()
    cfg.task.data, cfg.common_eval.path = str(data), str(path)
    fairseq.distributed.utils.call_main(cfg, fairseq_cli.eval_lm.main)


def train(lab, data, *flags):
    cfg = lab.config(*flags)
    cfg.task.data, cfg.checkpoint.save_dir = str(data), str(lab.new("saved"))
    fairseq.distributed.utils.call_main(cfg, fairseq_cli.train.main)


def stops(run, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 2
    return one_error(capsys.readouterr())


@pytest.mark.parametrize("option", ["--finetune-from-model", "--restore-file"])
def test_a_training_on_another_network_is_said(lab, runs, other_words, capsys, option):
    """fairseq says that the architectures differ, and hides which weight it is."""
    dense, packed = runs.stock("plain").path, runs.ipq("plain").path
    start = functools.partial(train, lab, lab.data, option, dense)
    message = stops(functools.partial(train, lab, other_words, option, dense), capsys)
    assert "decoder.embed_tokens.weight: is [110, 32] in the file and" in message
    assert "dict.txt" in message
    for flags, names in {
        ("--decoder-layers", 3): "decoder.layers.2.",
        ("--decoder-layers", 1): "decoder.layers.1.",
        ("--decoder-ffn-embed-dim", 128): "decoder.layers.0.fc1.weight: is [64, 32] in the file and [128, 32]",
    }.items():
        message = stops(functools.partial(start, *flags), capsys)
        assert str(dense) in message
        assert names in message
    cfg = lab.config(option, packed, arch="transformer_lm")
    cfg.checkpoint.save_dir = str(lab.new("saved"))
    run = functools.partial(fairseq.distributed.utils.call_main, cfg, fairseq_cli.train.main)
    with fairseqs_own_noise():  # else its model takes the codes
        assert "in codes, and the model cannot; train with the --arch quant_noise_" in stops(run, capsys)


def test_a_dictionary_that_does_not_match_is_said(lab, runs, other_words, capsys):
    for path in (runs.stock("plain").path, runs.noised("plain").path, runs.packed("plain")):
        message = stops(functools.partial(evaluate, lab, other_words, path), capsys)
        assert "decoder.embed_tokens" in message
        assert "dict" in message
    activations = lab.plan({"stages": [WORD_VECTORS, FFN], "activations": {}})
    out = lab.new("out.safetensors")
    line = ["quantize", "--path", runs.stock("plain").path, "--plan", activations, "--out", out]
    assert "dict.txt the file was trained with" in fails(capsys, [*line, "--calibration-data", other_words])
    assert "no such folder with a dictionary" in fails(capsys, [*line, "--calibration-data", lab.new("none")])
    assert not out.exists()


def test_data_and_files_that_are_not_there_are_named(lab, runs, capsys, tmp_path):
    packed = runs.packed("plain")
    cure = "give the folder that fairseq-preprocess wrote"
    for run in (functools.partial(evaluate, lab, "/nowhere", packed), functools.partial(train, lab, "/nowhere")):
        assert stops(run, capsys).startswith(f"/nowhere/dict.txt: No such file or directory; {cure}")
    shutil.copy(lab.data / "dict.txt", tmp_path)
    for run in (functools.partial(evaluate, lab, tmp_path, packed), functools.partial(train, lab, tmp_path)):
        assert f"({tmp_path}/valid); {cure}, with this split in it" in stops(run, capsys)
    gone = functools.partial(evaluate, lab, lab.data, "/nowhere/model.safetensors")
    assert "/nowhere/model.safetensors; give the path of a file that is there" in stops(gone, capsys)
    gone = functools.partial(train, lab, lab.data, *split("--finetune-from-model /nowhere/model.pt"))
    assert "--finetune-from-model /nowhere/model.pt does not exist; give the path" in stops(gone, capsys)


def test_a_full_disk_ends_fairseqs_programs_in_a_line():
    with refuses(r"/disk/x\.pt: No space left on device; give another place, or make room"), as_user_errors():
        raise OSError(28, "No space left on device", "/disk/x.pt")
    with refuses("^No space left on device; make room, or give another --save-dir"), as_user_errors():
        raise OSError(28, "No space left on device")


FAULTS = [
    RuntimeError("a fault"),
    ValueError("a fault"),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
    OSError(errno.EMFILE, "Too many open files"),
    OSError(errno.EMFILE, "Too many open files", "/data/train.bin"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    TimeoutError("timed out"),
    OSError("[Errno 111] of a library's own words"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_an_error_that_no_path_cures_stays_as_it_is_with_its_traceback(fault, capsys):
    def program():
        raise fault

    with pytest.raises(type(fault)) as caught:
        in_a_line(program, is_program=True)()
    assert caught.value is fault
    assert caught.traceback[-1].name == "program"
    assert capsys.readouterr().err == ""


def test_the_error_behind_a_mistake_stays_in_reach():
    fault = OSError(errno.EDQUOT, "Disk quota exceeded")
    with refuses("^Disk quota exceeded; make room") as caught, as_user_errors():
        raise fault
    assert caught.value.__cause__ is fault
