"""Checkpoints that fairseq's scripts/average_checkpoints.py made: right, or refused at the first loading."""

import pytest
import torch
from lm_fixture import one_error, state_of
from toys import refuses

from fairseq_quant_noise.checkpoints.keys import CHECKSUMS
from fairseq_quant_noise.checkpoints.safe_load import safe_load
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.errors import UserError

FC1 = "decoder.layers.0.fc1.weight"


def averaged(states):
    """As the script does it: sums in each tensor's own dtype, and the first checkpoint's everything else."""
    model = {name: tensor.clone() for name, tensor in states[0]["model"].items()}
    for state in states[1:]:
        for name, tensor in state["model"].items():
            model[name] += tensor
    mean = {name: t / len(states) if t.is_floating_point() else t // len(states) for name, t in model.items()}
    return {**states[0], "model": mean}


@pytest.mark.parametrize("count", [2, 3])
def test_averaged_codes_are_refused_by_name_in_every_program(lab, runs, capsys, count):
    states = [state_of(runs.ipq("plain").path) for _ in range(count)]
    for number, state in enumerate(states):
        state["model"][f"{FC1}.codes"] = (state["model"][f"{FC1}.codes"] + number) % 16  # of several stages' ends
    path, out = lab.checkpoint(averaged(states)), lab.new("out")
    with refuses(rf"checkpoint .*: {FC1}\.codes is not as it was written.*give one of these as it is", UserError):
        safe_load(path)
    capsys.readouterr()
    resumed = lambda: lab.train("--restore-file", path, updates=8)  # noqa: E731
    for way in (lambda: lab.eval_lm(path), resumed, lambda: main(["export", "--path", str(path), "--out", str(out)])):
        with pytest.raises(SystemExit) as end:
            way()
        assert end.value.code == 2
        assert "is not as it was written" in one_error(capsys.readouterr())
    assert not out.exists()


def test_codes_whose_sum_overflows_are_refused(lab, runs):
    states = [state_of(runs.ipq("plain").path) for _ in range(20)]  # 20 * 15 is above 255
    with refuses("is not as it was written"):
        safe_load(lab.checkpoint(averaged(states)))


def test_centroids_are_averaged_where_the_codes_stay(lab, runs):
    """Two checkpoints of one stage with 16 centroids: the sum of their codes does not overflow."""
    states = [state_of(runs.ipq("plain").path) for _ in range(2)]
    states[1]["model"][f"{FC1}.centroids"] += 0.5
    path = lab.checkpoint(averaged(states))
    found, first = safe_load(path)["model"], states[0]["model"]
    assert torch.equal(found[f"{FC1}.codes"], first[f"{FC1}.codes"])
    torch.testing.assert_close(found[f"{FC1}.centroids"], first[f"{FC1}.centroids"] + 0.25)
    assert lab.eval_lm(path) > 1


def test_dense_checkpoints_carry_no_checksums_and_average(lab, runs):
    states = [state_of(runs.noised("plain").path), state_of(runs.noised("plain").path)]
    assert CHECKSUMS not in states[0]["extra_state"]
    assert lab.eval_lm(lab.checkpoint(averaged(states))) == pytest.approx(lab.eval_lm(runs.noised("plain").path))


def test_a_checkpoint_without_checksums_is_read(lab, runs):
    state = state_of(runs.ipq("plain").path)
    assert state["extra_state"].pop(CHECKSUMS)
    assert CHECKSUMS not in safe_load(lab.checkpoint(state))["extra_state"]
