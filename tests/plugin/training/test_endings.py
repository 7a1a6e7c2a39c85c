"""A run that ends before all stages of its plan says so in a line, and in its exit code where its options are wrong."""

import logging

import pytest
from lm_fixture import PLANS, one_error, split, state_of

from fairseq_quant_noise.checkpoints.keys import STAGES

RULES = [{**rule, "updates": 3} for rule in PLANS["plain"]["stages"]]


def flags_of(lab, *more):
    """Stages at the updates 0, 3 and 6, in epochs of two updates."""
    plan = lab.plan({"stages": RULES})
    return ["--quantization-config-path", plan, *split("--batch-size 64 --disable-validation"), *more]


@pytest.mark.parametrize(
    ("more", "done", "message"),
    [
        ("--max-epoch 2", 2, "--max-epoch 2: the run ended before stage 3 of 3"),
        ("--stop-min-lr 0.02", 0, "--stop-min-lr 0.02: a learning rate of 0.01 ends the run before stage 1 of 3"),
        (
            "--lr-scheduler fixed --lr 0.01,0.001 --stop-min-lr 0.001",
            2,
            "--stop-min-lr 0.001: a learning rate of 0.001 ends the run before stage 3 of 3",
        ),
    ],
)
def test_options_that_end_a_run_before_its_last_stage_are_an_error(lab, capsys, more, done, message):
    folder = lab.new()
    with pytest.raises(SystemExit) as end:
        lab.train(*flags_of(lab, *split(more)), save=folder, updates=9)
    assert end.value.code == 2
    said = one_error(capsys.readouterr())
    assert said.startswith(message)
    if done:
        assert "the same command goes on from the last checkpoint" in said
        assert state_of(folder / "checkpoint_last.pt")["extra_state"][STAGES]["done"] == done


def test_a_run_that_went_out_of_epochs_goes_on_with_more(lab, capsys):
    folder = lab.new()
    with pytest.raises(SystemExit):
        lab.train(*flags_of(lab, "--max-epoch", 2), save=folder, updates=9)
    run = lab.train(*flags_of(lab, "--max-epoch", 5), save=folder, updates=9)
    assert [log["num_updates"] for log in run.updates] == [5, 6, 7, 8, 9]
    assert run.trainer.quantizer.to_come == 0


def test_a_run_whose_time_is_over_warns_and_is_no_failure(lab, caplog):
    """A scheduler may give it more; the checkpoint is there to go on from."""
    folder = lab.new()
    with caplog.at_level(logging.WARNING):
        lab.train(*flags_of(lab, "--stop-time-hours", 1e-9), save=folder, updates=9)
    assert "--stop-time-hours 1e-09: the run ended before stage 2 of 3" in caplog.text
    run = lab.train(*flags_of(lab), save=folder, updates=9)
    assert run.updates[0]["num_updates"] == 2
    assert run.trainer.quantizer.to_come == 0


def test_a_run_that_goes_on_with_fewer_updates_than_its_stages_need_is_refused(lab, capsys):
    folder = lab.new()
    with pytest.raises(SystemExit):
        lab.train(*flags_of(lab, "--max-epoch", 2), save=folder, updates=9)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        lab.train(*flags_of(lab), save=folder, updates=4)
    assert end.value.code == 2
    assert "stage 3 of 3 starts after update 6, and --max-update 4" in one_error(capsys.readouterr())


def test_a_dense_checkpoint_that_leaves_no_update_for_the_stages_is_refused(lab, runs, capsys):
    stock = runs.stock("plain").path
    plan = ["--quantization-config-path", lab.plan(PLANS["plain"])]
    with pytest.raises(SystemExit) as end:
        lab.train(*plan, "--restore-file", stock, updates=6)
    assert end.value.code == 2
    assert one_error(capsys.readouterr()).startswith("--max-update 6: the checkpoint is at update 6")


def test_a_run_that_has_done_its_stages_ends_as_ever(lab):
    run = lab.train(*flags_of(lab, "--max-epoch", 4), updates=9)
    assert run.trainer.quantizer.to_come == 0
