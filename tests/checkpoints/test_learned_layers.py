"""LayerDrop with learned rates in fairseq, and `prune --keep learned` on its checkpoints."""

import shutil

import pytest
import torch
from finished import differences
from lm_fixture import PLANS, one_error, state_of

from fairseq_quant_noise import load
from fairseq_quant_noise.cli.main import main

LEARNING = ["--decoder-layers", 4, "--decoder-layerdrop", 0.5, "--learn-layerdrop"]
SCORES = "decoder.layers.keep_scores"


@pytest.fixture(scope="module")
def learned(lab):
    """A run that has learned, with a checkpoint in its middle."""
    return lab.train(*LEARNING, "--quant-noise-pq", 0.1, "--save-interval-updates", 4, updates=8)


def run(*arguments):
    main([str(argument) for argument in arguments])


def with_scores(lab, path, scores):
    state = state_of(path)
    state["model"] = {**state["model"], SCORES: torch.tensor(scores)}
    return lab.checkpoint(state)


def test_the_rates_are_trained_and_in_the_checkpoint_and_no_score_depends_on_them(lab, learned):
    scores = state_of(learned.path)["model"][SCORES]
    assert scores.shape == (4,)
    assert scores.abs().min() > 0
    assert lab.eval_lm(learned.path) == pytest.approx(learned.ppl, rel=1e-5)
    other = with_scores(lab, learned.path, [9.0, -9.0, 0.0, 1.0])
    assert lab.eval_lm(other) == lab.eval_lm(learned.path)


def test_a_run_that_stops_and_goes_on_ends_with_the_same_bits(lab, learned):
    folder = lab.new()
    folder.mkdir()
    (before,) = learned.folder.glob("checkpoint_*_4.pt")
    shutil.copy(before, folder / "checkpoint_last.pt")
    again = lab.train(*LEARNING, "--quant-noise-pq", 0.1, "--save-interval-updates", 4, updates=8, save=folder)
    assert differences(learned.path, again.path) == []


def test_half_precision_learns_them_too(lab):
    run = lab.train(*LEARNING, "--fp16", updates=8)
    assert run.trainer.get_model().decoder.layers.keep_scores.abs().max() > 0


@pytest.mark.upstream(33)
@pytest.mark.parametrize(
    ("keep", "layers"), [("learned", [1, 3]), ("learned:3", [0, 1, 3]), ("decoder=learned:1", [3])]
)
def test_prune_keeps_the_layers_with_the_highest_rates(lab, learned, capsys, keep, layers):
    path, out = with_scores(lab, learned.path, [0.1, 0.2, -0.4, 0.7]), lab.new("pruned.pt")
    run("prune", "--path", path, "--keep", keep, "--out", out)
    assert capsys.readouterr().out == f"{out}: {len(layers)} layers in decoder\n"
    given, left = state_of(path)["model"], state_of(out)
    for new, old in enumerate(layers):
        assert torch.equal(left["model"][f"decoder.layers.{new}.fc1.weight"], given[f"decoder.layers.{old}.fc1.weight"])
    assert not [name for name in left["model"] if "keep_scores" in name]
    listed = lab.new("listed.pt")
    run("prune", "--path", path, "--keep", ",".join(map(str, layers)), "--out", listed)
    assert lab.eval_lm(out) == lab.eval_lm(listed)


def test_a_pruned_checkpoint_goes_on_and_may_learn_again(lab, learned):
    out = lab.new("pruned.pt")
    run("prune", "--path", learned.path, "--keep", "learned", "--out", out)
    lab.train("--decoder-layers", 2, "--restore-file", out, updates=2)
    again = lab.train("--decoder-layers", 2, *LEARNING[2:], "--finetune-from-model", out, updates=2)
    assert state_of(again.path)["model"][SCORES].shape == (2,)


def test_stages_files_and_stock_checkpoints_leave_the_scores_out(lab, learned):
    plan, file, stock = lab.plan(PLANS["plain"]), lab.new("file.safetensors"), lab.new("stock.pt")
    run("quantize", "--path", learned.path, "--plan", plan, "--out", file)
    assert not [name for name in load(file).state_dict() if "keep_scores" in name]
    run("to-dense", learned.path, "--out", stock)
    state = state_of(stock)
    assert SCORES not in state["model"]
    assert "learn_layerdrop" not in state["cfg"]["model"]
    assert lab.eval_lm(stock) == pytest.approx(learned.ppl, rel=1e-5)
    staged = lab.train(*LEARNING, "--finetune-from-model", learned.path, "--quantization-config-path", plan)
    exported = lab.new("exported.safetensors")
    run("export", "--path", staged.path, "--out", exported)
    assert lab.eval_lm(exported) == pytest.approx(staged.ppl, rel=1e-5)


def test_a_checkpoint_that_learned_none_is_refused_by_name(lab, runs, capsys):
    path, out = runs.stock("plain").path, lab.new("pruned.pt")
    with pytest.raises(SystemExit) as caught:
        run("prune", "--path", path, "--keep", "learned", "--out", out)
    assert caught.value.code == 2
    said = one_error(capsys.readouterr())
    assert said.startswith("--keep learned: no rates of decoder.layers were learned; train with --learn-layerdrop")
    assert not out.exists()
    with pytest.raises(SystemExit):
        lab.train("--learn-layerdrop")
    said = one_error(capsys.readouterr())
    assert said == "--learn-layerdrop: give --encoder-layerdrop P or --decoder-layerdrop P too"


def test_a_stock_architecture_learns_them_too(lab):
    found = lab.train(*LEARNING, arch="transformer_lm", updates=3)
    out = lab.new("pruned.pt")
    run("prune", "--path", found.path, "--keep", "learned:1", "--out", out)
    assert lab.eval_lm(out) > 1
    assert lab.eval_lm(found.path) == pytest.approx(found.ppl, rel=1e-5)


def test_a_run_that_did_not_learn_them_is_not_gone_on_with(lab, learned, capsys):
    """Its optimizer has no state of the scores."""
    before = lab.train(*LEARNING[:-1], updates=2)
    with pytest.raises(SystemExit):
        lab.train(*LEARNING, save=before.folder, updates=4)
    assert "was trained with learn_layerdrop False" in one_error(capsys.readouterr())
