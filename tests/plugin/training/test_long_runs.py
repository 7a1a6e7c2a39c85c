"""Memory over many updates; tests/scripts/long_run.py does it for 2,000."""

import gc

import pytest
import torch
from lm_fixture import PLANS
from watching import NOISE, watched

pytestmark = pytest.mark.slow

EPOCH, STAGE = 4, 12  # updates


@pytest.fixture(scope="module")
def counts(lab):
    """(tensors alive, hooks on modules) after each of 36 updates; a stage begins at 0, 12 and 24."""
    seen = []

    def look(trainer, _):
        gc.collect()
        alive = sum(isinstance(thing, torch.Tensor) and thing.dim() > 0 for thing in gc.get_objects())  # logs have none
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.get_model().modules())
        seen.append((alive, hooks))

    plan = lab.plan({"noise": NOISE, **PLANS["plain"]})
    flags = ["--quantization-config-path", plan, "--quant-noise-log-interval", EPOCH, "--disable-validation"]
    gc.collect()
    gc.freeze()  # what there was before is not looked at
    with watched(look):
        lab.train(*flags, "--batch-size", 32, updates=3 * STAGE)
    gc.unfreeze()
    return seen


def test_tensors_and_hooks_do_not_pile_up_over_refreshes_measurements_and_epochs(counts):
    """The third epoch of each stage is as the second was, but for its last update, when the next stage begins."""
    assert len(counts) == 3 * STAGE
    for start in range(0, 3 * STAGE, STAGE):
        second, third = start + EPOCH, start + 2 * EPOCH
        assert counts[second : third - 1] == counts[third : third + EPOCH - 1]
        assert min(counts[second])
