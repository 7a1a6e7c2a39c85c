"""Stage, size, ratio and time left in fairseq's line of progress, in TensorBoard and in wandb."""

import re
import struct
from pathlib import Path

import pytest
from fairseq.logging import progress_bar
from lm_fixture import PLANS, ipq_flags
from tensorboardX.proto.event_pb2 import Event

STAGES = [1, 2, 2, 3, 3, 3, 3]  # after each of seven updates: the next one begins with the second and the fourth
WATCHED = ("ipq_stage", "ipq_mib", "ipq_ratio", "minutes_left")


class Wandb:
    """Takes the place of wandb, and keeps what it is told."""

    def __init__(self):
        self.projects, self.logged, self.config = [], [], {}

    def init(self, project, **_):
        self.projects.append(project)

    def log(self, stats, step):
        self.logged.append((step, stats))


def events(folder: Path):
    """(tag, step, value) of each scalar in TensorBoard's files: records of length, checksum, event, checksum."""
    for path in folder.glob("events.*"):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            yield from ((v.tag, event.step, v.simple_value) for v in event.summary.value)


@pytest.fixture(scope="module")
def watched_run(lab, runs):
    """Three stages over seven updates with every way to watch: (lines of the log, TensorBoard's folder, wandb)."""
    board, wandb = lab.new("board"), Wandb()
    flags = ["--finetune-from-model", runs.stock("plain").path, "--quantization-config-path", lab.plan(PLANS["plain"])]
    flags += [*ipq_flags("plain"), "--log-format", "simple", "--log-interval", 1]
    flags += ["--tensorboard-logdir", board, "--wandb-project", "compression"]
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress_bar, "wandb", wandb)
        patch.setattr(progress_bar.logger, "info", lines.append)
        train(lab, *flags, updates=7)
    return lines, board, wandb


def train(lab, *flags, **settings):
    """A training whose event files are closed at its end: fairseq leaves that to the end of the process."""
    lab.train(*flags, **settings)
    progress_bar._close_writers()
    progress_bar._tensorboard_writers.clear()


def test_the_progress_line_has_stage_size_ratio_and_time_left(watched_run):
    lines, _, _ = watched_run
    updates = [line for line in lines if "num_updates=" in line and "valid_loss" not in line]
    stages = [int(re.search(r"ipq_stage=(\d+)", line)[1]) for line in updates]
    assert stages == STAGES
    sizes = [float(re.search(r"ipq_mib=([\d.]+)", line)[1]) for line in updates]
    ratios = [float(re.search(r"ipq_ratio=([\d.]+)", line)[1]) for line in updates]
    assert sizes == sorted(sizes, reverse=True)
    assert ratios == sorted(ratios)
    assert all(re.search(r"minutes_left=[\d.]+", line) for line in updates[1:])
    assert "minutes_left=0" in updates[-1]


def test_tensorboard_has_them_as_curves(watched_run):
    _, board, _ = watched_run
    inner = list(events(board / "train_inner"))
    curves = {name: {step: value for tag, step, value in inner if tag == name} for name in WATCHED}
    assert [curves["ipq_stage"][n] for n in range(1, 8)] == STAGES
    assert curves["ipq_ratio"][7] > 3 > curves["ipq_ratio"][1] > 1
    assert curves["ipq_mib"][7] < curves["ipq_mib"][1]
    assert set(curves["minutes_left"]) == set(range(2, 8))
    valid = {tag for tag, _, _ in events(board / "valid")}
    assert {"ipq_stage", "ipq_mib", "ipq_ratio"} <= valid
    assert "minutes_left" not in valid


def test_wandb_is_told_the_same(watched_run):
    _, board, wandb = watched_run
    assert set(wandb.projects) == {"compression"}
    told = {(name, step): value for step, stats in wandb.logged for name, value in stats.items()}
    for tag, step, value in events(board / "train_inner"):
        if tag in WATCHED:
            assert told[f"train_inner/{tag}", step] == pytest.approx(value)


def test_any_criterion_shows_the_size_and_a_dense_run_only_the_time(lab, runs):
    board = lab.new("board")
    plan = ["--quantization-config-path", lab.plan(PLANS["plain"])]
    train(lab, "--tensorboard-logdir", board, "--log-format", "simple", "--log-interval", 1, *plan, updates=3)
    names = {tag for tag, _, _ in events(board / "train_inner")}
    assert set(WATCHED) <= names
    board = lab.new("board")
    train(lab, "--tensorboard-logdir", board, "--log-format", "simple", "--log-interval", 1, updates=3)
    names = {tag for tag, _, _ in events(board / "train_inner")}
    assert names & set(WATCHED) == {"minutes_left"}
