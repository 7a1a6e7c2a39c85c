"""Checkpoints without running what is in them."""

import builtins
import io
import os
import pickle
import subprocess
import tarfile
import zipfile
from argparse import Namespace

import pytest
import torch
from toys import refuses

from fairseq_quant_noise.checkpoints.safe_load import safe_load
from fairseq_quant_noise.errors import DamagedFileError, UserError


class Runs:
    """Unpickling it calls `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def attacks(marker):
    """Each would create the file `marker`. By the name that torch gives the global: the oldest pickle protocol's."""
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "posix.system": Runs(os.system, f"touch {marker}"),
        "eval": Runs(builtins.eval, code),
        "exec": Runs(builtins.exec, code),
        "io.open": Runs(builtins.open, str(marker), "w"),
        "(commands|subprocess).Popen": Runs(subprocess.Popen, ["touch", str(marker)]),
        "getattr": Runs(getattr, Runs(__import__, "os"), "system"),
    }


def save(content, path, **settings):
    torch.save(content, path, **settings)
    return path


@pytest.fixture
def place(tmp_path):
    return tmp_path / "checkpoint.pt"


@pytest.mark.upstream(23)
@pytest.mark.parametrize("name", list(attacks("")))
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_by_the_globals_name_and_nothing_runs(tmp_path, place, name, zipped):
    attack = attacks(tmp_path / "marker")[name]
    save({"model": {}, "args": attack}, place, _use_new_zipfile_serialization=zipped)
    with refuses(
        rf"^checkpoint .*checkpoint\.pt: refused, its pickle calls for {name}, which could run code; if you",
        DamagedFileError,
    ):
        safe_load(place)
    assert not (tmp_path / "marker").exists()


@pytest.mark.upstream(23)
def test_an_attack_inside_a_namespace_is_refused_too(tmp_path, place):
    save({"model": {}, "args": Namespace(lr=Namespace(x=[Runs(os.system, f"touch {tmp_path}/marker")]))}, place)
    with refuses("refused, its pickle calls for posix.system", DamagedFileError):
        safe_load(place)
    assert not (tmp_path / "marker").exists()


@pytest.mark.upstream(23)
def test_a_bare_pickle_is_refused(tmp_path, place):
    place.write_bytes(pickle.dumps({"model": Runs(os.system, f"touch {tmp_path}/marker")}, protocol=2))
    with refuses("refused, its pickle calls for posix.system", DamagedFileError):
        safe_load(place)
    assert not (tmp_path / "marker").exists()


SHAPES = {  # pickles, by what is refused
    "changes or makes <class 'set'>, which": b"\x80\x02}\x8f(K\x01K\x02u.",  # SETITEMS of a set
    "the operation STACK_GLOBAL; save it with torch.save and": b"\x80\x04X\x01\x00\x00\x00a\x93.",
    "an unknown operation, 255": b"\x80\x02\xff.",
    "asks for something other than the numbers of a tensor": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "pickle calls .*, which could run code": b"\x80\x02K\x01)R.",
    "pickle changes or makes .*int": b"\x80\x02K\x01}b.",
    r"tensors of torch\.distributed\.tensor; save it with": b"\x80\x02ctorch.distributed.tensor\nDTensor\n.",
    r"calls for x\?\[31m\.y,": b"\x80\x02cx\x1b[31m\ny\n.",
}


@pytest.fixture
def nothing_added():
    """torch's own allow-list, without what its modules add when they are imported (torch.distributed.tensor does)."""
    added = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.add_safe_globals(added)


@pytest.mark.upstream(23)
@pytest.mark.usefixtures("nothing_added")
@pytest.mark.parametrize("reason", list(SHAPES))
def test_whatever_torch_refuses_in_a_pickle_is_said_in_a_line(place, reason):
    with zipfile.ZipFile(place, "w") as file:
        for name, content in {"data.pkl": SHAPES[reason], "byteorder": b"little", "version": b"3\n"}.items():
            file.writestr(f"archive/{name}", content)
    with refuses(rf"^checkpoint .*checkpoint\.pt: refused, .*{reason}", DamagedFileError):
        safe_load(place)


def test_a_class_outside_the_allow_list_is_refused_by_its_name(place):
    save({"model": {}, "x": pytest.approx(1.0)}, place)
    with refuses(r"refused, its pickle calls for _pytest\.", DamagedFileError):
        safe_load(place)


@pytest.mark.upstream(23)
def test_a_published_checkpoint_with_a_namespace_loads(place):
    save({"model": {"w": torch.ones(2)}, "args": Namespace(arch="transformer_lm", lr=[0.1], x=None)}, place)
    state = safe_load(place)
    assert state["args"] == Namespace(arch="transformer_lm", lr=[0.1], x=None)
    assert torch.equal(state["model"]["w"], torch.ones(2))


def test_what_fairseq_writes_besides_loads(place):
    content = {
        "model": {"h": torch.ones(2).half(), "codes": torch.zeros(2, dtype=torch.uint8)},
        "cfg": {"model": {"arch": "a", "dropout": 0.1}, "task": None},
        "optimizer_history": [{"num_updates": 3}],
        "extra_state": {"metrics": [(0, "x", {"n": 1.5})]},
    }
    assert safe_load(save(content, place))["cfg"] == content["cfg"]


def test_the_allow_list_is_for_this_load_alone(place):
    save({"model": {}, "args": Namespace()}, place)
    safe_load(place)
    with pytest.raises(pickle.UnpicklingError, match="argparse"):
        torch.load(place, weights_only=True)


JUNK = [b"a line of text\n", b"PK\x03\x04" + bytes(50), bytes(100), b"PK\x05\x06" + bytes(18)]


@pytest.mark.parametrize("content", JUNK)
def test_a_file_that_is_no_checkpoint_is_refused(place, content):
    place.write_bytes(content)
    with refuses("checkpoint .*: not a whole PyTorch checkpoint; copy or download it again", DamagedFileError):
        safe_load(place)


def test_an_empty_file_is_refused_as_such(place):
    place.write_bytes(b"")
    with refuses("checkpoint .*: is empty; copy or download it again", DamagedFileError):
        safe_load(place)


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with refuses("checkpoint .*: is a device or a pipe; copy it to a file first"):
        safe_load(tmp_path / "pipe")


def test_a_checkpoint_that_is_cut_is_refused(place):
    content = save({"model": {"w": torch.ones(1000)}}, place).read_bytes()
    for end in range(1, len(content), len(content) // 12):
        place.write_bytes(content[:end])
        with refuses("not a whole PyTorch checkpoint", DamagedFileError):
            safe_load(place)


def archived(write):
    """The bytes of an archive with a model.pt in it."""
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def tar(mode):
    def write(file):
        with tarfile.open(fileobj=file, mode=mode) as archive:
            archive.addfile(tarfile.TarInfo("roberta.base/model.pt"), io.BytesIO())

    return archived(write)


def zipped_model(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("roberta.base/model.pt", "")


OTHER_KINDS = {
    "tar.gz": (tar("w:gz"), "an archive, as .tar.gz and .zip files are; unpack it and give the .pt file in it"),
    "tar": (tar("w:"), "an archive, as .tar.gz"),
    "zip": (archived(zipped_model), "an archive, as .tar.gz"),
    "page": (
        b"\n<!DOCTYPE html><html></html>",
        "a web page, not a checkpoint; download it with the address of the file",
    ),
    "denied": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page, not a checkpoint"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS.*; run git lfs pull"),
    "packed": ((40).to_bytes(8, "little") + b'{"__metadata__":{}}' + bytes(40), "its name must end in .safetensors"),
}


@pytest.mark.parametrize("kind", list(OTHER_KINDS))
def test_a_file_of_another_kind_is_named_with_the_cure(place, kind):
    content, message = OTHER_KINDS[kind]
    place.write_bytes(content)
    with refuses(rf"^checkpoint .*checkpoint\.pt: .*{message}"):
        safe_load(place)


def test_a_torchscript_program_is_named(place):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(place))
    with refuses("a TorchScript program, which holds no configuration; give the checkpoint that fairseq-train wrote"):
        safe_load(place)


@pytest.mark.parametrize("content", [{"weights": {}}, [1], torch.ones(2), "model"], ids=str)
def test_a_file_without_a_model_is_refused(place, content):
    with refuses("has no 'model'; give a checkpoint that fairseq-train wrote"):
        safe_load(save(content, place))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with refuses("No such file or directory; give the path of a checkpoint"):
        safe_load(tmp_path / "none.pt")
    with refuses("give the path of a checkpoint"):
        safe_load(tmp_path)


@pytest.mark.parametrize("content", [b"a line of text\n", None])
def test_a_damaged_or_hostile_file_ends_with_exit_code_3(tmp_path, place, content):
    """The design's exit codes: 3 is a file that is damaged or hostile, 2 the user's mistake."""
    if content is None:
        save({"model": Runs(os.system, f"touch {tmp_path}/marker")}, place)
    else:
        place.write_bytes(content)
    with pytest.raises(UserError) as caught:
        safe_load(place)
    assert caught.value.exit_code == 3
