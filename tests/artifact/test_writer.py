"""Writing a packed file: the same bytes for the same model, whole or not at all, and no larger than promised."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_files import packed_zoo, quantized_afresh
from torch import nn
from toys import quiet, refuses

from fairseq_quant_noise.artifact import pack
from fairseq_quant_noise.artifact.writer import serialize, write
from fairseq_quant_noise.quantization.quantize import quantize_
from fairseq_quant_noise.quantization.table import model_bytes
from fairseq_quant_noise.utils import files
from fairseq_quant_noise.utils.files import replace_file


def header_bytes(content):
    """8 bytes of length, and the header."""
    return 8 + int.from_bytes(content[:8], "little")


# The bytes


def test_the_same_model_gives_the_same_bytes(tmp_path):
    assert serialize(packed_zoo(quantized_afresh())) == serialize(packed_zoo())
    n = write(packed_zoo(), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == serialize(packed_zoo())
    assert (tmp_path / "a").stat().st_size == n


def test_another_process_gives_the_same_bytes():
    """Hash randomization orders sets and maps differently in every process."""
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]; from packed_files import packed_zoo; import hashlib;"
        "from fairseq_quant_noise.artifact.writer import serialize;"
        "print(hashlib.sha256(serialize(packed_zoo())).hexdigest())"
    )
    tests = Path(__file__).parents[1]
    folders = [str(tests / "support"), str(tests.parent)]
    run = subprocess.run([sys.executable, "-c", script, *folders], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == hashlib.sha256(serialize(packed_zoo())).hexdigest()


def test_the_hash_is_of_the_file_with_the_hash_zero():
    content = bytes(serialize(packed_zoo()))
    header = json.loads(content[8 : header_bytes(content)])
    manifest = json.loads(header["__metadata__"]["fairseq_quant_noise"])
    zeroed = content.replace(manifest["sha256"].encode(), b"0" * 64)
    assert hashlib.sha256(zeroed).hexdigest() == manifest["sha256"]


def test_the_file_is_an_ordinary_safetensors_file(tmp_path):
    import safetensors.torch

    packed = packed_zoo()
    write(packed, tmp_path / "a")
    loaded = safetensors.torch.load_file(tmp_path / "a")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in packed.tensors.items())
    assert len(loaded) == len(packed.tensors)


class WordsAndLayers(nn.Module):
    """287,000 parameters: tied words, and a feed-forward block."""

    def __init__(self):
        super().__init__()
        self.emb, self.fc1, self.fc2 = nn.Embedding(4000, 64), nn.Linear(64, 256), nn.Linear(256, 64)
        self.out = nn.Linear(64, 4000, bias=False)
        self.out.weight = self.emb.weight


@pytest.mark.upstream(7)
def test_the_file_is_at_most_1_percent_over_the_papers_accounting_and_its_header():
    torch.manual_seed(0)
    stages = [{"match": m, "block_size": 8, "n_centroids": 256} for m in ("emb", "fc.")]
    model = quantize_(WordsAndLayers(), {"stages": stages}, progress=quiet)
    content = serialize(pack(model))
    paper, dense = model_bytes(model)
    assert len(content) - header_bytes(content) <= 1.01 * paper
    assert header_bytes(content) < 2000
    assert dense > 15 * paper


@pytest.mark.parametrize("scheme", ["int8", "int4", "int3"])
@pytest.mark.parametrize("range_", ["tensor", "channel"])
def test_a_file_of_n_bits_has_the_papers_bytes_and_its_scales_and_its_header(scheme, range_):
    model = nn.Sequential(nn.Linear(512, 2048, bias=False), nn.Linear(2048, 512, bias=False))
    stages = [{"match": ".*", "scheme": scheme, "range": range_}]
    content = serialize(pack(quantize_(model, {"stages": stages}, progress=quiet)))
    paper, dense = model_bytes(model)
    assert paper == dense * int(scheme[3:]) / 32
    scales = 8 * (2048 + 512 if range_ == "channel" else 2)
    assert len(content) - header_bytes(content) == paper + scales
    assert scales <= (0.03 if range_ == "channel" else 0.01) * paper  # 2 % of int4: channels of 512 numbers


# Whole or not at all


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    return path


def only_the_old(path):
    return path.read_bytes() == b"old" and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("call", ["replace", "fsync", "chmod"])
def test_when_the_disk_fails_the_old_file_stays_and_nothing_else(old, monkeypatch, call):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, call, fail)
    with refuses(r"cannot write .*model\.safetensors: No space left on device; choose another place"):
        write(packed_zoo(), old)
    assert only_the_old(old)


def test_an_interrupt_leaves_the_old_file_and_nothing_else(old, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace_file(old, b"new")
    assert only_the_old(old)


def test_the_file_is_on_disk_before_it_takes_the_name(old, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(files.os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    replace_file(old, b"new")
    assert calls[:2] == ["fsync", "replace"]
    assert old.read_bytes() == b"new"
    assert os.listdir(old.parent) == [old.name]


@pytest.fixture
def umask():
    """Sets the umask; the one of before is back afterwards."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path):
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_can_be_read_by_whom_the_umask_lets(tmp_path, umask, mask, expected):
    umask(mask)
    replace_file(tmp_path / "new", b"x")
    assert mode(tmp_path / "new") == expected


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o644, 0o664])
def test_a_file_that_is_replaced_hands_on_its_permissions(old, umask, kept):
    old.chmod(kept)
    replace_file(old, b"new")
    assert (mode(old), old.read_bytes()) == (kept, b"new")


def test_too_many_open_files_is_not_said_to_be_the_place(old, monkeypatch):
    def fail(*args):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="Too many open files"):
        replace_file(old, b"new")
    assert only_the_old(old)


def test_a_bare_name_is_written_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    replace_file("new", b"x")
    assert (tmp_path / "new").read_bytes() == b"x"


def test_a_missing_folder_and_a_folder_in_the_place_are_refused(tmp_path):
    with refuses("cannot write .*: No such file or directory; choose another place"):
        replace_file(tmp_path / "none" / "file", b"x")
    (tmp_path / "folder").mkdir()
    with refuses("cannot write .*folder: Is a directory"):
        replace_file(tmp_path / "folder", b"x")
    assert os.listdir(tmp_path) == ["folder"]
