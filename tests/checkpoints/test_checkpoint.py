"""A checkpoint as one object: read once, its options resolved once."""

import pytest
import torch
from lm_fixture import FFN, state_of

from fairseq_quant_noise.checkpoints import checkpoint
from fairseq_quant_noise.checkpoints.checkpoint import Checkpoint
from fairseq_quant_noise.cli.main import main


@pytest.fixture
def counted(monkeypatch):
    """How often a function of a module is called: `counted(module, name)` begins to count into a list."""

    def count(module, name):
        calls, function = [], getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(args) or function(*args, **kwargs))
        return calls

    return count


def test_quantize_reads_a_checkpoint_once_and_resolves_its_options_once(lab, runs, counted, capsys):
    """Where gradients are measured and ranges calibrated, fairseq's network is made from what has been read."""
    path = lab.checkpoint({**state_of(runs.stock("plain").path), "last_optimizer_state": None})
    plan = lab.plan({"stages": [FFN], "activations": {"bits": 8, "calibration_batches": 1}})
    read, resolved = counted(torch, "load"), counted(checkpoint, "packed_config")
    out = ["--out", str(lab.new("packed.safetensors"))]
    main(["quantize", "--path", str(path), "--plan", plan, "--calibration-data", str(lab.data), *out])
    assert "gradients on" in capsys.readouterr().err
    assert [args[0] for args in read].count(str(path)) == len(read) == 1
    assert len(resolved) == 1


def test_moments_stay_when_the_optimizer_is_forgotten(runs):
    stock = Checkpoint(runs.stock("plain").path)
    kept = stock.moments
    stock.forget_optimizer()
    assert stock.moments is kept
    assert len(kept) == len(stock.weights) - 1, "of all but the version"
    assert Checkpoint(stock.path, stock.state).moments == {}


@pytest.mark.parametrize("extra", [{}, {"extra_state": None}, {"extra_state": {"epoch": 1}}])
def test_a_checkpoint_without_stages_has_none(extra):
    """One that was saved again may hold None there."""
    assert Checkpoint("dense.pt", {"model": {}, **extra}).stages == {}
