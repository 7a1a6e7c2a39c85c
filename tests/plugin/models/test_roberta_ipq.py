"""Criterion ipq around RoBERTa's two criterions, with the uncompressed model for teacher."""

import pytest
import torch
from roberta_fixture import (
    MASKED,
    SENTENCES,
    both_tasks,
    plan_of,
    roberta,  # noqa: F401
    roberta_batch,
)

from fairseq_quant_noise.checkpoints.options import SHARED, packed_config, unwrapped
from fairseq_quant_noise.plugin.distillation import Recorder, distillation_loss


@both_tasks
def test_ipq_trains_with_a_teacher(roberta, kind):  # noqa: F811
    stock, plan = roberta.run("stock", kind).path, roberta.plan(plan_of(kind))
    flags = ["--finetune-from-model", stock, "--quantization-config-path", plan]
    flags += ["--criterion", "ipq", "--ipq-criterion", kind, "--ipq-teacher", stock]
    run = roberta.train(*flags, kind=kind, updates=4)
    assert run.updates[-1]["ipq_distillation"] > 0
    assert run.updates[-1]["ipq_ratio"] > 4
    if kind == SENTENCES:
        assert run.valid[-1]["accuracy"] > 0
    cfg = packed_config(run.path, torch.load(run.path, weights_only=False))["cfg"]
    assert cfg["criterion"]["_name"] == kind
    assert set(cfg["criterion"]) == {"_name", *(SHARED if kind == SENTENCES else ())}


@both_tasks
def test_every_prediction_is_distilled(roberta, kind):  # noqa: F811
    """Class 1 is no padding, though the padding word has the number 1 too."""
    sample, flags = roberta_batch(kind), ("--dropout", 0, "--attention-dropout", 0)
    student, teacher = (roberta.model(*flags, kind=kind, seed=seed).eval() for seed in (1, 2))
    recorder = Recorder(student)
    roberta.criterion(kind)(recorder, sample)
    args, kwargs = recorder.call
    log_q, log_p = (torch.log_softmax(out[0], -1) for out in (recorder.output, teacher(*args, **kwargs)))
    assert len(log_q) == (int((sample["target"] != 1).sum()) if kind == MASKED else 4)
    expected = (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close(distillation_loss(recorder, teacher, sample, padding_idx=1), expected)


@pytest.mark.parametrize("name", ["cross_entropy", "sentence_prediction"])
def test_the_wrapped_criterion_keeps_the_name_of_its_head(name):
    ipq = {"_name": "ipq", "ipq_criterion": name, "ipq_criterion_options": '{"x": 1}', "sentence_avg": True}
    shared = {"classification_head_name": "mnli", "regression_target": True}
    expected = {"_name": name, "x": 1} | (shared if name == "sentence_prediction" else {})
    assert unwrapped(ipq | shared) == expected
