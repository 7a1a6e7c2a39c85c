"""`tuning: {schedule: restart}`: each stage has the learning rates of a run of its own."""

import pytest
import torch
from fairseq import optim
from fairseq.optim.lr_scheduler import build_lr_scheduler
from lm_fixture import PLANS, same, split, state_of

from fairseq_quant_noise.plugin.training.stage_schedule import StageSchedule

STAGES = [{**rule, "updates": n} for rule, n in zip(PLANS["plain"]["stages"], (4, 3, 5), strict=True)]
RESTART = {"stages": STAGES, "tuning": {"schedule": "restart"}}
DATA = split("--batch-size 24 --disable-validation")
COSINE = "--lr-scheduler cosine --warmup-updates 2 --min-lr 0.0001"
SCHEDULES = {
    "cosine over a stage": COSINE,
    "cosine of a given period": f"{COSINE} --lr-period-updates 6 --t-mult 2",
    "polynomial_decay over a stage": "--lr-scheduler polynomial_decay --warmup-updates 1 --total-num-update 12",
    "polynomial_decay over a given length": "--lr-scheduler polynomial_decay --total-num-update 7",
    "inverse_sqrt": "--lr-scheduler inverse_sqrt --warmup-updates 2 --warmup-init-lr 0.001",
    "tri_stage": "--lr-scheduler tri_stage --phase-ratio (0.25,0.25,0.5)",
    "fixed, by epoch": "--lr-scheduler fixed --lr 0.01,0.004 --warmup-updates 2",
}


def schedule(lab, flags, updates):
    """fairseq's configuration and scheduler for a run of so many updates, and its optimizer."""
    cfg = lab.config(*flags.split(), updates=updates)
    optimizer = optim.build_optimizer(cfg.optimizer, [torch.nn.Parameter(torch.zeros(1))])
    return cfg, build_lr_scheduler(cfg.lr_scheduler, optimizer), optimizer


def rates(scheduler, optimizer, updates, start=0, first_epoch=1, epoch_of=3):
    """The rate of each update of a run, which has epochs of `epoch_of` updates."""
    found = []
    for i in range(updates):
        if i and i % epoch_of == 0:
            scheduler.step(first_epoch + i // epoch_of - 1)
            scheduler.step_begin_epoch(first_epoch + i // epoch_of)
        scheduler.step_update(start + i)
        found.append(optimizer.get_lr())
    return found


@pytest.mark.parametrize("flags", SCHEDULES.values(), ids=SCHEDULES)
def test_a_stage_has_the_rates_that_fairseq_gives_a_run_of_its_length(lab, flags):
    """Stages of 4, 3 and 5 updates, that begin in epochs 1, 2 and 4; 12 updates in all."""
    cfg, scheduler, optimizer = schedule(lab, flags, 12)
    staged = StageSchedule(cfg, scheduler)
    start = 0
    for length, epoch in ((4, 1), (3, 2), (5, 4)):
        own = flags.replace("--total-num-update 12", f"--total-num-update {length}")
        _, alone, its = schedule(lab, own, length)
        alone.step_begin_epoch(1)
        staged.begin(start, epoch, length)
        assert rates(staged, optimizer, length, start, epoch) == rates(alone, its, length)
        start += length


@pytest.mark.parametrize("flags", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_that_is_loaded_goes_on(lab, flags):
    cfg, scheduler, optimizer = schedule(lab, flags, 12)
    staged = StageSchedule(cfg, scheduler)
    staged.begin(4, 2, 5)
    rates(staged, optimizer, 2, 4, 2)
    other, fresh, its = schedule(lab, flags, 12)
    loaded = StageSchedule(other, fresh)
    loaded.load_state_dict(staged.state_dict())
    loaded.step_begin_epoch(2)  # as the epoch in progress begins once more
    assert rates(loaded, its, 3, 6, 2) == rates(staged, optimizer, 3, 6, 2)


@pytest.fixture(scope="module")
def restarted(lab):
    """Twelve updates in three epochs of five; stages at 0, 4 and 7."""
    return lab.train(*flags_of(lab), "--save-interval-updates", 1, updates=12)


def flags_of(lab):
    return ["--quantization-config-path", lab.plan(RESTART), *COSINE.split(), *DATA]


def test_a_run_restarts_the_schedule_and_keeps_its_count_of_updates(lab, restarted):
    found = [log["lr"] for log in restarted.updates]
    begin = [at for at, lr in enumerate(found, 1) if lr == pytest.approx(0.0001)]
    assert begin == [4, 7]  # the first rate of the warm-up, as the second and third stage begin
    assert [log["num_updates"] for log in restarted.updates] == list(range(1, 13))
    alone = lab.train(*COSINE.split(), *DATA, updates=5)
    assert found[7:] == [log["lr"] for log in alone.updates]


@pytest.mark.parametrize("at", ["1_3", "1_4", "2_9"])
def test_a_resumed_run_has_the_same_rates_and_bits(lab, restarted, at):
    checkpoint, done = restarted.folder / f"checkpoint_{at}.pt", int(at[2:])
    resumed = lab.train(*flags_of(lab), "--restore-file", checkpoint, updates=12)
    assert [log["lr"] for log in resumed.updates] == [log["lr"] for log in restarted.updates[done:]]
    one, other = state_of(resumed.path), state_of(restarted.path)
    assert same(one["model"], other["model"])
    assert same(one["last_optimizer_state"], other["last_optimizer_state"])


def test_finetuning_from_a_checkpoint_of_a_stage_begins_its_schedule_anew(lab, restarted):
    checkpoint = restarted.folder / "checkpoint_2_6.pt"  # in the second stage
    run = lab.train(*flags_of(lab), "--finetune-from-model", checkpoint, updates=8)
    assert [log["lr"] for log in run.updates] == [log["lr"] for log in restarted.updates[4:]]


def test_by_epoch(lab):
    """Three stages of an epoch of two updates: each begins with the first rate of the list, and its first warm-up."""
    flags = split("--lr-scheduler fixed --lr 0.01,0.004 --warmup-updates 2 --batch-size 64 --max-epoch 3")
    plan = lab.plan({**PLANS["plain"], "tuning": {"schedule": "restart"}})
    run = lab.train("--quantization-config-path", plan, *flags, updates=None)
    assert [round(log["lr"], 4) for log in run.updates] == [0.01, 0.01] * 3
