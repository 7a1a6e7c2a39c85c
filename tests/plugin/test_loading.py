"""Checkpoints: stock ones go on training here, ours have stock's keys, hostile ones are refused, old ones load."""

import os
from dataclasses import fields

import pytest
import torch
from lm_fixture import both_kinds, old_style, one_error, state_of

from fairseq_quant_noise.checkpoints.safe_load import safe_load
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.plugin.models.options import QuantNoiseOptions

NOISE = ["--quant-noise-pq", 0.2]


class Call:
    """Pickles to a call of `function`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.fixture
def hostile(lab, runs):
    """A checkpoint that makes a folder when it is unpickled, and that folder."""
    folder = lab.new("made-by-the-pickle")
    path = lab.checkpoint({**state_of(runs.stock("plain").path), "task_state": Call(os.mkdir, str(folder))})
    torch.load(path, weights_only=False)
    folder.rmdir()  # it was there: the trap works
    return path, folder


@both_kinds
def test_restore_file_goes_on_from_a_stock_checkpoint(lab, runs, kind):
    stock = runs.stock(kind)
    run = lab.train("--restore-file", stock.path, *NOISE, "--seed", 1, kind=kind, updates=8)
    assert [log["num_updates"] for log in run.updates] == [7, 8]
    assert float(run.updates[0]["loss"]) < float(stock.updates[0]["loss"]) - 1


@both_kinds
def test_finetune_from_model_starts_from_a_stock_checkpoint(lab, runs, kind):
    stock = runs.stock(kind)
    run = lab.train("--finetune-from-model", stock.path, *NOISE, kind=kind, updates=2)
    assert [log["num_updates"] for log in run.updates] == [1, 2]
    assert float(run.updates[0]["loss"]) < float(stock.updates[0]["loss"]) - 0.5, "of a network that starts anew"


@pytest.mark.upstream(3)
@both_kinds
def test_a_checkpoint_trained_here_differs_from_a_stock_one_in_the_architecture_alone(runs, kind):
    ours, stock = state_of(runs.noised(kind).path), state_of(runs.stock(kind).path)
    assert ours.keys() == stock.keys()
    assert [(n, t.shape, t.dtype) for n, t in ours["model"].items()] == [
        (n, t.shape, t.dtype) for n, t in stock["model"].items()
    ]
    assert ours["cfg"].keys() == stock["cfg"].keys()
    differences = {
        name
        for name in ours["cfg"]["model"].keys() | stock["cfg"]["model"].keys()
        if ours["cfg"]["model"].get(name) != stock["cfg"]["model"].get(name)
    }
    of_the_noise = {field.name for field in fields(QuantNoiseOptions)}  # options that stock models do not have
    assert differences - of_the_noise <= {"_name", "arch", "quant_noise_pq"}
    assert ours["cfg"]["model"]["quant_noise_pq"] == 0.2  # on record, though fairseq's own hooks are kept out


@both_kinds
def test_a_checkpoint_trained_here_evaluates_as_training_said(lab, runs, kind):
    run = runs.noised(kind)
    assert lab.eval_lm(run.path) == pytest.approx(run.ppl, rel=1e-5)


VERBS = {
    "plan": "plan --path {path} --plan {plan}",
    "quantize": "quantize --path {path} --plan {plan} --out {out}",
    "export": "export --path {path} --out {out}",
    "to-dense": "to-dense {path} --out {out}",
}


@pytest.mark.upstream(23)
@pytest.mark.parametrize("program", ["eval_lm", "--restore-file", "--finetune-from-model", "--ipq-teacher", *VERBS])
def test_a_foreign_global_is_refused_and_never_runs(lab, hostile, program, capsys):
    path, folder = hostile
    out = lab.new("out")
    plan = lab.plan({"stages": [{"match": ".*fc1"}]})

    def run():
        if program in VERBS:
            main(VERBS[program].format(path=path, plan=plan, out=out).split())
        elif program == "eval_lm":
            lab.eval_lm(path)
        else:
            lab.train(program, path, *(["--criterion", "ipq"] if program == "--ipq-teacher" else []))

    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 3
    message = one_error(capsys.readouterr())
    assert f"{os.mkdir.__module__}.mkdir" in message
    assert str(path) in message
    assert not folder.exists()
    assert not out.exists()


@pytest.mark.upstream(23)
@pytest.mark.parametrize(("kind", "zipped"), [("plain", True), ("adaptive", False)], ids=["plain-zip", "adaptive-tar"])
def test_a_checkpoint_with_a_namespace_loads(lab, runs, kind, zipped):
    stock = runs.stock(kind)
    old = lab.checkpoint(old_style(state_of(stock.path)), _use_new_zipfile_serialization=zipped)
    assert lab.eval_lm(old) == pytest.approx(stock.ppl, rel=1e-5)


@pytest.mark.upstream(23)
@pytest.mark.parametrize("configuration", ["cfg", "args"])
def test_a_checkpoint_saved_again_as_a_refusal_advises_loads(lab, runs, configuration):
    """With its model and its configuration alone; fairseq looks into more."""
    stock = runs.stock("plain")
    state = old_style(state_of(stock.path)) if configuration == "args" else state_of(stock.path)
    kept = lab.checkpoint({name: state[name] for name in ("model", configuration)})
    assert lab.eval_lm(kept) == pytest.approx(stock.ppl, rel=1e-5)
    run = lab.train("--restore-file", kept, *NOISE, updates=2)
    assert [log["num_updates"] for log in run.updates] == [1, 2]


@pytest.mark.upstream(23)
@both_kinds
def test_a_checkpoint_with_a_namespace_goes_on_training(lab, runs, kind):
    old = lab.checkpoint(old_style(state_of(runs.stock(kind).path)))
    run = lab.train("--restore-file", old, *NOISE, kind=kind, updates=7)
    assert [log["num_updates"] for log in run.updates] == [7]


@pytest.mark.parametrize("flags", ["--patience 2", "--keep-best-checkpoints 1", "--best-checkpoint-metric ppl"])
def test_nothing_that_fairseq_saves_is_refused(lab, flags):
    run = lab.train(*flags.split(), "--save-interval-updates", 1, updates=2)
    for path in run.folder.glob("*.pt"):
        assert safe_load(path)["model"]


def test_a_checkpoint_of_another_shape_is_refused_by_the_weight(lab, runs, capsys):
    with pytest.raises(SystemExit) as end:
        lab.train("--restore-file", runs.stock("plain").path, "--decoder-ffn-embed-dim", 128)
    assert end.value.code == 2
    assert "decoder.layers.0.fc1.weight: is [64, 32] in the file" in one_error(capsys.readouterr())


def test_codes_that_do_not_fit_the_model_are_refused(lab, runs, capsys):
    with pytest.raises(SystemExit) as end:
        lab.train("--finetune-from-model", runs.ipq("plain").path, "--decoder-ffn-embed-dim", 128)
    assert end.value.code == 2
    assert "decoder.layers.0.fc1" in one_error(capsys.readouterr())
