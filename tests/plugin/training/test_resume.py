"""A run that is killed goes on with the same command, and ends as if nothing had been."""

import contextlib
import logging
import os
import shutil
import signal
from pathlib import Path
from unittest import mock

import fairseq_cli.train
import pytest
import torch
from finished import differences
from forked import exit_code, losses, train
from lm_fixture import PLANS, one_error, split, state_of
from toys import refuses

import fairseq_quant_noise.quantization.encoding
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.plugin import saving as checkpoint_files
from fairseq_quant_noise.plugin.training import resume
from fairseq_quant_noise.plugin.training.stages import StageController

#: Two epochs of five updates; stages at 0, 3 and 6; a checkpoint every second update.
FLAGS = split("--decoder-layerdrop 0.2 --batch-size 24 --save-interval-updates 2")
NOISE = [
    {"match": r".*\.fc[12]", "kind": "pq", "p": 0.3, "choice": "clusters", "n_centroids": 8, "refresh": "epoch"},
    {"match": r".*(embed|self_attn).*", "kind": ["pq", "int8"], "p": 0.3, "n_centroids": 8, "refresh": 4},
]
KILLED = -signal.SIGKILL


def half(path):
    """Cut a file to its first half."""
    os.truncate(path, os.path.getsize(path) // 2)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner, name, number, then=die, counts=lambda *args: True):
    """Kill this process at a call of `owner.name`: the `number`th of those that count, with `then` in its place."""
    real, seen = getattr(owner, name), []

    def counted(*args, **kwargs):
        seen.append(counts(*args))
        if seen[-1] and sum(seen) == number:
            then(*args)
            die()
        return real(*args, **kwargs)

    return mock.patch.object(owner, name, counted)


def save_half(state, path):
    with open(path, "wb") as file:
        torch.serialization.save(state, file)
    half(path)


def copy_half(source, target):
    Path(target).write_bytes(Path(source).read_bytes()[:1000])


MOMENTS = {  # in the order in which one run meets them
    "inside the first k-means": lambda: at_call(fairseq_quant_noise.quantization.encoding, "encode_together", 3),
    "while a checkpoint is written": lambda: at_call(checkpoint_files.torch, "save", 2, save_half),
    "while it is copied to checkpoint_last.pt": lambda: at_call(
        checkpoint_files.shutil, "copyfile", 1, copy_half, lambda source, target: "last" in str(target)
    ),
    "between k-means and the next update": lambda: at_call(StageController, "_rebuild_optimizer", 2),
    "in the second epoch": lambda: at_call(checkpoint_files.torch, "save", 3, save_half),
}


def train_until(moment, lab, folder, flags):
    """In a process of its own: train, and die at the moment."""
    with MOMENTS[moment]() if moment else contextlib.nullcontext():
        train(lab, folder, *flags, kind="adaptive", updates=9)


def export(checkpoint, out, dies=False):
    """In a process of its own: write the packed file, and die before it gets its name."""
    with at_call(os, "replace", 1) if dies else contextlib.nullcontext():
        main(["export", "--path", str(checkpoint), "--out", str(out)])


@pytest.fixture(scope="module")
def killed(lab):
    """The folder of a run that went through, that of one that was killed, and how each of its processes ended."""
    flags = [*FLAGS, "--quantization-config-path", lab.plan({"noise": NOISE, **PLANS["adaptive"]})]
    whole, broken = lab.new("whole"), lab.new("killed")
    assert exit_code(train_until, None, lab, whole, flags) == 0
    ends = {moment: exit_code(train_until, moment, lab, broken, flags) for moment in (*MOMENTS, None)}
    return whole, broken, ends


@pytest.mark.upstream(6)
def test_a_run_that_is_killed_five_times_ends_with_the_same_bits(killed):
    whole, broken, ends = killed
    assert ends == {**dict.fromkeys(MOMENTS, KILLED), None: 0}
    assert differences(whole / "checkpoint_last.pt", broken / "checkpoint_last.pt") == []
    assert len(state_of(broken / "checkpoint_last.pt")["optimizer_history"]) > 3  # it did resume, not start anew


def test_a_run_that_is_killed_logs_the_losses_of_one_that_is_not(killed):
    whole, broken, _ = killed
    assert losses(whole).keys() == set(range(1, 10))
    assert losses(broken) == losses(whole)


def test_an_export_that_is_killed_leaves_the_old_file_and_can_be_done_again(killed, lab):
    whole, broken, _ = killed
    out, other = lab.new("model.safetensors"), lab.new("model.safetensors")
    out.write_bytes(b"the old file")
    assert exit_code(export, broken / "checkpoint_last.pt", out, True) == KILLED
    assert out.read_bytes() == b"the old file"
    assert exit_code(export, broken / "checkpoint_last.pt", out) == 0
    assert exit_code(export, whole / "checkpoint_last.pt", other) == 0
    assert out.read_bytes() == other.read_bytes()


# A last checkpoint that is cut all the same: by a power cut, or by fairseq without this package.


def test_where_the_last_checkpoint_is_cut_the_newest_whole_one_takes_its_place(lab, caplog):
    folder = lab.new()
    lab.train("--save-interval-updates", 2, save=folder, updates=4)
    half(folder / "checkpoint_last.pt")
    half(folder / "checkpoint_best.pt")
    with caplog.at_level(logging.WARNING):
        run = lab.train("--save-interval-updates", 2, save=folder, updates=5)
    assert [log["num_updates"] for log in run.updates] == [5]
    assert "checkpoint_last.pt is cut" in caplog.text
    assert "checkpoint_1_4.pt" in caplog.text


def test_where_no_checkpoint_is_whole_the_run_is_refused_and_does_not_start_from_zero(lab, capsys):
    folder = lab.new()
    lab.train(save=folder, updates=1)
    for path in folder.glob("*.pt"):
        half(path)
    with pytest.raises(SystemExit) as end:
        lab.train(save=folder, updates=2)
    assert end.value.code == 3
    assert "checkpoint_last.pt" in one_error(capsys.readouterr())


def test_a_checkpoint_of_an_early_torch_is_whole_and_an_empty_file_is_not(tmp_path):
    old, empty = tmp_path / "old.pt", tmp_path / "empty.pt"
    torch.save({"model": {}}, old, _use_new_zipfile_serialization=False)
    empty.touch()
    assert checkpoint_files.is_whole(old)
    assert not checkpoint_files.is_whole(empty)


@pytest.mark.parametrize("name", ["save", "copyfile"])
def test_a_full_disk_ends_the_run_with_one_line_and_the_checkpoints_before_it(lab, monkeypatch, capsys, name):
    folder = lab.new()
    lab.train("--save-interval-updates", 1, save=folder, updates=1)
    before = (folder / "checkpoint_last.pt").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil if name == "copyfile" else torch, name, full)
    monkeypatch.setattr(checkpoint_files, "WAIT", 0)
    with pytest.raises(SystemExit) as end:
        lab.train("--save-interval-updates", 1, save=folder, updates=2)
    assert end.value.code == 2
    message = one_error(capsys.readouterr())
    assert str(folder) in message
    assert "No space left on device" in message
    assert (folder / "checkpoint_last.pt").read_bytes() == before
    assert not list(folder.glob("*.tmp"))


# A checkpoint that is asked for and is not there.


@pytest.mark.parametrize("option", ["--restore-file", "--continue-once"])
def test_a_checkpoint_that_is_not_there_is_refused(lab, capsys, option):
    """fairseq trains on, from random weights."""
    with pytest.raises(SystemExit) as end:
        lab.train(option, "/nowhere/model.pt", updates=1)
    assert end.value.code == 2
    assert one_error(capsys.readouterr()).startswith(f"{option} /nowhere/model.pt: no such file; give the path of a")


def test_a_training_may_name_its_own_checkpoint_before_there_is_one_and_stages_may_not(lab, capsys):
    """As a script has it that may be started again: `--restore-file $SAVE_DIR/checkpoint_last.pt`."""
    folder = lab.new()
    own = ["--restore-file", folder / "checkpoint_last.pt"]
    with pytest.raises(SystemExit) as end:
        lab.train(*own, "--quantization-config-path", lab.plan(PLANS["plain"]), save=folder, updates=3)
    assert end.value.code == 2
    assert "stages would quantize random weights" in one_error(capsys.readouterr())
    assert len(lab.train(*own, save=folder, updates=1).updates) == 1
    assert [log["num_updates"] for log in lab.train(*own, save=folder, updates=2).updates] == [2]


@pytest.mark.parametrize("fault", [RuntimeError("CUDA error: device-side assert triggered"), OSError(24, "Too many")])
def test_a_fault_while_saving_is_not_said_to_be_the_disk(tmp_path, monkeypatch, fault):
    def save(obj, path):
        Path(path).write_bytes(b"half")
        raise fault

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(checkpoint_files, "WAIT", 0)
    with pytest.raises(type(fault)) as caught:
        checkpoint_files.torch_persistent_save({}, str(tmp_path / "checkpoint_last.pt"))
    assert caught.value is fault
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", ["[enforce fail at inline_container.cc:672] . unexpected pos", "Parent directory /x"])
def test_torchs_own_words_for_a_full_disk_are(tmp_path, monkeypatch, words):
    def save(obj, path):
        raise RuntimeError(words)

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(checkpoint_files, "WAIT", 0)
    with refuses("make room there, or give another --save-dir"):
        checkpoint_files.torch_persistent_save({}, str(tmp_path / "checkpoint_last.pt"))


def test_a_checkpoint_that_is_replaced_hands_on_its_permissions(tmp_path):
    path = tmp_path / "checkpoint_last.pt"
    path.touch(mode=0o600)
    checkpoint_files.torch_persistent_save({}, str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    checkpoint_files.WholeCopies.copy(str(path), str(tmp_path / "new.pt"))
    path.chmod(0o640)
    checkpoint_files.WholeCopies.copy(str(tmp_path / "new.pt"), str(path))
    assert path.stat().st_mode & 0o777 == 0o640


# Where the run was in its data.


@pytest.mark.parametrize(
    ("done", "before", "now", "together", "expected"),
    [
        (7, 2, 1, 1, 14),
        (14, 1, 2, 1, 7),
        (15, 1, 2, 1, 7),  # one batch is seen twice
        (7, 2, 1, 4, 12),
        (6, 4, 3, 2, 8),
        (0, 2, 1, 3, 0),
    ],
)
def test_a_position_counted_on_other_processes(done, before, now, together, expected):
    assert resume.recount(done, before, now, together) == expected


@pytest.mark.parametrize("flags", ["", "--patience 2 --validate-interval-updates 1 --save-interval-updates 1 --lr 0"])
def test_a_run_that_is_complete_gets_no_update_more(lab, flags):
    """A scheduler may give a command again that has just ended; fairseq does an update before it looks."""
    folder, updates = lab.new(), 9 if flags else 3
    done = lab.train(*split(flags), save=folder, updates=updates)
    before = shutil.copy(done.path, lab.new("before.pt"))
    again = lab.train(*split(flags), save=folder, updates=updates)
    assert again.updates == []
    assert differences(before, done.path) == []
    if not flags:
        assert [log["num_updates"] for log in lab.train(save=folder, updates=4).updates] == [4]


def test_patience_counts_on_over_a_resume(lab):
    flags = split("--patience 4 --validate-interval-updates 1 --save-interval-updates 1 --lr 0")
    folder, stop = lab.new(), fairseq_cli.train.should_stop_early
    whole = lab.train(*flags, updates=9)
    assert len(whole.updates) == 5
    lab.train(*flags, save=folder, updates=3)
    vars(stop).clear()  # as in a new process
    resumed = lab.train(*flags, save=folder, updates=9)
    assert [log["num_updates"] for log in resumed.updates] == [4, 5]
