"""When the stages start in a run, and which options they contradict."""

import pytest
from toys import refuses

from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.plugin.training.stage_times import StageTimes


def times(*updates, max_update=0, max_epoch=0, origin=None, **tuning):
    """Of a plan whose stages have these updates."""
    stages = [{"match": str(i), "updates": n} if n else {"match": str(i)} for i, n in enumerate(updates)]
    made = StageTimes(Plan.of({"stages": stages, "tuning": tuning}), max_epoch, max_update)
    if origin is not None:
        made.begin(origin)
    return made


@pytest.mark.parametrize(
    ("given", "starts", "unit"),
    [
        ({"max_update": 7}, [0, 2, 4], "update"),
        ({"max_update": 7, "max_epoch": 3}, [0, 2, 4], "update"),
        ({"max_epoch": 7}, [0, 2, 4], "epoch"),
        ({"max_update": 13, "origin": 6}, [0, 2, 4], "update"),
    ],
)
def test_stages_share_what_is_left_of_the_run(given, starts, unit):
    found = times(None, None, None, **given)
    assert (found.starts, found.unit) == (starts, unit)


def test_stages_are_due_once_the_first_has_begun():
    found = times(4, 3, 5, max_update=20)
    assert found.due(9) == 0
    found.begin(6)
    assert [found.due(now) for now in (5, 6, 9, 10, 12, 13, 99)] == [0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("stage", "now", "max_update", "left"),
    [
        (0, None, 18, 4),
        (1, 12, 18, 1),
        (2, None, 21, 8),  # the run ends the last stage
        (2, 14, 0, 4),  # in a run without --max-update, the plan
    ],
)
def test_what_is_left_of_a_stage(stage, now, max_update, left):
    assert times(4, 3, 5, max_update=max_update, origin=6).left(stage, now) == left


def test_epochs_end_a_stage_that_is_counted_in_epochs():
    assert times(None, None, max_epoch=4, origin=0).left(0) is None


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            lambda: times(4500, 4500, 4500, max_update=8000, origin=0),
            "stage 3 of 3 starts after update 9000, and --max-update 8000 ends the run before; give more than 9000, or "
            "the plan's stages fewer updates",
        ),
        (lambda: times(3, 2, 1, max_update=5, origin=0), "stage 3 of 3 starts after update 5, and --max-update 5"),
        (lambda: times(3, 2, 1, max_update=9, origin=6), "stage 2 of 3 starts after update 9, .* give more than 11"),
    ],
)
def test_a_run_that_ends_before_a_stage_starts_is_refused(found, message):
    with refuses(message):
        found().check(0, 0)


def test_stages_that_are_done_are_not_looked_at_any_more():
    found = times(3, 2, 1, max_update=4, origin=0)
    found.check(3, 0)
    with refuses("stage 3 of 3"):
        found.check(2, 0)


@pytest.mark.parametrize("given", [{"max_update": 6, "origin": 6}, {"max_update": 6, "origin": 9}])
def test_a_checkpoint_that_leaves_no_update_for_the_stages_is_refused(given):
    with refuses("--max-update 6: the checkpoint is at update .*--finetune-from-model"):
        times(None, None, **given)


def test_a_stage_that_restarts_the_schedule_must_be_longer_than_the_warm_up():
    found = times(4, 3, 5, max_update=12, origin=0, schedule="restart")
    found.check(0, 2)
    with refuses(r"stage 2 of 3 has 3 updates, all of them --warmup-updates \(3\)"):
        found.check(0, 3)
    times(4, 3, 5, max_update=12, origin=0).check(0, 3)  # one warm-up for all stages
