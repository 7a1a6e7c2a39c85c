"""Each stage has its own best validation: for --patience, for the best checkpoints and for reduce_lr_on_plateau."""

import contextlib

import pytest
from finished import differences
from lm_fixture import PLANS, split, state_of

from fairseq_quant_noise.checkpoints.keys import STAGES

pytestmark = pytest.mark.slow

#: A validation and a checkpoint every second update, and no other.
EVERY = split(
    "--validate-interval-updates 2 --save-interval-updates 2 --keep-interval-updates 1 --validate-interval 99"
)


@pytest.fixture
def dense(runs):
    """A checkpoint of a network whose loss rises when its weights are quantized."""
    return runs.stock("plain").path


def with_plan(lab, dense, plan=PLANS["plain"]):
    return ["--quantization-config-path", lab.plan(plan), "--finetune-from-model", dense]


@pytest.fixture(scope="module")
def patient(lab):
    """60 updates of dense training, then stages of 8 updates, with a patience that the first jump would exhaust."""
    trained = lab.train("--disable-validation", updates=60)
    flags = [*with_plan(lab, trained.path), *EVERY, *split("--patience 1 --keep-best-checkpoints 2 --lr 0.003")]
    return lab.train(*flags, updates=24)


def best(run, stage):
    """The lowest loss of the validations in this stage."""
    return min(log["loss"] for log in run.valid if log["ipq_stage"] == stage)


def test_patience_ends_no_run_before_its_last_stage(patient):
    assert patient.trainer.quantizer.to_come == 0
    assert patient.updates[-1]["num_updates"] > 16


def test_patience_still_ends_a_run_in_its_last_stage(lab, dense):
    """Nothing is learned: the first validation of the last stage, at its start, is the best one."""
    run = lab.train(*with_plan(lab, dense), *EVERY, *split("--patience 2 --lr 0"), updates=30)
    assert run.updates[-1]["num_updates"] == 24
    assert run.trainer.quantizer.to_come == 0


def test_the_best_checkpoint_is_of_the_last_stage(patient):
    kept = state_of(patient.folder / "checkpoint_best.pt")["extra_state"]
    assert kept[STAGES]["done"] == 3
    assert kept["val_loss"] == best(patient, 3)


def test_earlier_stages_keep_their_best_checkpoints_under_names_of_their_own(patient):
    for stage in (1, 2):
        kept = state_of(patient.folder / f"checkpoint_best_before_stage_{stage + 1}.pt")["extra_state"]
        assert kept[STAGES]["done"] == stage
        assert kept["val_loss"] == best(patient, stage)


def test_the_best_checkpoints_that_are_kept_are_of_the_last_stage(patient):
    names = [path.name for path in patient.folder.glob("checkpoint.best_loss_*.pt")]
    last = [name for name in names if "before" not in name]
    assert 1 <= len(last) <= 2
    assert all(state_of(patient.folder / name)["extra_state"][STAGES]["done"] == 3 for name in last)
    assert any("before_stage_3" in name for name in names)


def test_a_dense_run_that_patience_has_ended_goes_on_to_stages_in_its_folder(lab):
    folder = lab.new()
    flags = [*EVERY, *split("--patience 2 --lr 0")]
    dense = lab.train(*flags, save=folder, updates=12)
    assert len(dense.updates) == 6
    run = lab.train(*flags, "--quantization-config-path", lab.plan(PLANS["plain"]), save=folder, updates=12)
    assert run.trainer.quantizer.to_come == 0
    assert STAGES not in state_of(folder / "checkpoint_best_before_stage_1.pt")["extra_state"]


PLATEAU = split("--lr-scheduler reduce_lr_on_plateau --lr-shrink 0.5 --lr-threshold 0.9")


def test_a_stage_is_no_plateau(lab, dense):
    """Of three epochs of two updates. No epoch reaches the threshold, so that a fourth would be one too many."""
    flags = [*PLATEAU, "--lr-patience", 2, *split("--batch-size 64 --max-epoch 9")]
    rates = [
        {log["lr"] for log in lab.train(*flags, *more, updates=None).updates} for more in ([], with_plan(lab, dense))
    ]
    assert 0.005 in rates[0]
    assert rates[1] == {0.01}


@pytest.mark.parametrize("stages", [(), (5, 4, 4)], ids=["dense", "stages"])
def test_a_run_that_resumes_on_a_plateau_ends_with_the_same_bits(lab, stages):
    """Nine epochs of two updates, stopped after the second and the fourth."""
    flags = [*PLATEAU, *split("--lr-patience 1 --batch-size 64")]
    if stages:
        rules = [{**rule, "updates": n} for rule, n in zip(PLANS["plain"]["stages"], stages, strict=True)]
        flags += ["--quantization-config-path", lab.plan({"stages": rules})]
    whole, folder = lab.train(*flags, "--max-epoch", 9, updates=None), lab.new()
    assert len({log["lr"] for log in whole.updates}) > 1
    for epoch in (2, 4, 9):
        with pytest.raises(SystemExit) if stages and epoch < 9 else contextlib.nullcontext():
            lab.train(*flags, "--max-epoch", epoch, save=folder, updates=None)
    assert differences(folder / "checkpoint_last.pt", whole.path) == []
