"""Codes that train inside fairseq's Trainer, and stages that begin together."""

import json
import logging
import shutil

import pytest
import torch
from finished import differences
from lm_fixture import FFN, NAG, PLANS, WORD_VECTORS, both_kinds, ipq_flags, one_error, split, state_of

from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.plugin.training import codes as code_training
from fairseq_quant_noise.plugin.training.stages import StageController
from fairseq_quant_noise.quantization.code_training import trained_weights

TRAINED = {"codes": "train", "tuning": {"stages": "joint"}}


def flags(lab, runs, kind="plain", **plan):
    """From the stock model through a plan of these sections, with criterion ipq."""
    path = lab.plan(PLANS[kind] | plan)
    return ["--finetune-from-model", runs.stock(kind).path, "--quantization-config-path", path, *ipq_flags(kind)]


def codes_of(path):
    """The codes in a checkpoint, by the weight's name."""
    return {name: t for name, t in state_of(path)["model"].items() if name.endswith(".codes")}


def changed(one, other):
    """How many codes differ between two checkpoints."""
    before, after = codes_of(one), codes_of(other)
    assert before.keys() == after.keys()
    return sum(int((before[name] != after[name]).sum()) for name in before)


@pytest.fixture
def begun(monkeypatch):
    """(call, update) of each stage that begins and each optimizer that is built for new parameters."""
    seen = []
    for real in (StageController._quantize_stage, StageController._rebuild_optimizer):

        def spy(controller, stage, real=real):
            seen.append((real.__name__.split("_")[1], stage, controller.trainer.get_num_updates()))
            real(controller, stage)

        monkeypatch.setattr(StageController, real.__name__, spy)
    return seen


@pytest.mark.parametrize("updates", [None, 2])
def test_joint_stages_begin_together_and_the_optimizer_is_built_once(lab, begun, updates):
    stages = [{**rule, **({"updates": updates} if updates else {})} for rule in PLANS["plain"]["stages"]]
    plan = lab.plan({"stages": stages, "tuning": {"stages": "joint"}})
    lab.train("--quantization-config-path", plan, "--save-interval-updates", 1)
    assert begun == [("quantize", 0, 0), ("quantize", 1, 0), ("quantize", 2, 0), ("rebuild", 1, 0)]


def test_joint_stages_that_restart_the_schedule_have_its_whole_length(lab):
    stages = [{**rule, "updates": 2} for rule in PLANS["plain"]["stages"]]
    plan = lab.plan({"stages": stages, "tuning": {"stages": "joint", "schedule": "restart"}})
    cosine = split("--lr-scheduler cosine --lr-period-updates 6")
    rates = [log["lr"] for log in lab.train("--quantization-config-path", plan, *cosine).updates]
    assert rates == [log["lr"] for log in lab.train(*cosine).updates]


@both_kinds
def test_codes_train_in_a_run_and_are_what_is_evaluated_and_exported(lab, runs, kind, tmp_path):
    fixed = lab.train(*flags(lab, runs, kind, tuning={"stages": "joint"}), kind=kind)
    run = lab.train(*flags(lab, runs, kind, **TRAINED), "--ipq-teacher", runs.stock(kind).path, kind=kind)
    assert len(trained_weights(run.model)) == len({t.data_ptr() for t in codes_of(run.path).values()}) > 10
    assert changed(fixed.path, run.path) > 100
    assert lab.eval_lm(run.path) == pytest.approx(run.ppl, rel=1e-5)
    main(["export", "--path", str(run.path), "--out", str(tmp_path / "file.safetensors")])
    assert lab.eval_lm(tmp_path / "file.safetensors") == pytest.approx(run.ppl, rel=1e-5)
    assert read(tmp_path / "file.safetensors").manifest.plan["codes"] == {"kind": "train"}
    assert not any("latent" in name for name in read(tmp_path / "file.safetensors").tensors)


def lines(caplog, lab, *given):
    """The log of training, line by line, each after two updates."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "fairseq.logging.progress_bar"):
        lab.train(*given, "--log-format", "json", "--log-interval", 2)
    return [json.loads(record.getMessage()) for record in caplog.records if record.name == "train_inner"]


def test_the_log_says_how_many_codes_change_and_how_far_the_weight_is(lab, runs, caplog):
    found = lines(caplog, lab, *flags(lab, runs, **TRAINED))
    assert len(found) == 3
    assert all(0 < float(line["ipq_codes_changed"]) < 100 for line in found)
    assert all(0 < float(line["ipq_distortion"]) < 1 for line in found)
    assert not any("ipq_codes_changed" in line for line in lines(caplog, lab, *flags(lab, runs)))


@pytest.mark.parametrize(("every", "share"), [(1, 1.0), (3, 0.25)])
def test_encoding_takes_place_every_so_many_updates(lab, runs, monkeypatch, every, share):
    seen = []

    def spy(model, given):
        seen.append(given)
        return 0.0

    monkeypatch.setattr(code_training, "encode_again", spy)
    codes = {"kind": "train", "every": every, "share": share}
    lab.train(*flags(lab, runs, codes=codes, tuning={"stages": "joint"}), updates=7)
    assert seen == [share] * (7 // every)


@pytest.mark.parametrize(
    ("codes", "more"),
    [
        ({"kind": "train"}, ["--decoder-layerdrop", 0.3]),
        ({"kind": "train", "every": 2, "share": 0.3, "learning_rate": 0.3}, NAG),
    ],
)
@both_kinds
def test_a_run_that_stops_and_goes_on_ends_with_the_same_bits(lab, runs, kind, codes, more):
    """With stages in turn, of which one begins after the stop, noise on what is dense, and a codebook of a stage."""
    rules = [{**rule, "updates": 3, "codebook": "shared"} for rule in PLANS[kind]["stages"]]
    given = flags(lab, runs, kind, stages=rules, codes=codes, centroids={"dtype": "int8"})
    given += ["--quant-noise-pq", 0.2, "--save-interval-updates", 1, *more]
    whole = lab.train(*given, kind=kind, updates=9)
    for update in (4, 5, 8):
        folder = lab.new()
        folder.mkdir()
        (before,) = whole.folder.glob(f"checkpoint_*_{update}.pt")
        shutil.copy(before, folder / "checkpoint_last.pt")
        broken = lab.train(*given, kind=kind, updates=9, save=folder)
        assert [log["num_updates"] for log in broken.updates] == [*range(update + 1, 10)]
        assert differences(whole.path, broken.path) == []


@pytest.mark.usefixtures("flat")
@pytest.mark.parametrize("kind", ["fixed", "train"])
def test_codes_of_9_bits_resume_and_are_what_is_evaluated_and_exported(lab, runs, kind, tmp_path):
    stages = [{**FFN, "block_size": 1, "n_centroids": 300}]
    given = [*flags(lab, runs, stages=stages, codes=kind), "--save-interval-updates", 1]
    whole = lab.train(*given, updates=4)
    assert {codes.dtype for codes in codes_of(whole.path).values()} == {torch.int32}
    folder = lab.new()
    folder.mkdir()
    (before,) = whole.folder.glob("checkpoint_*_2.pt")
    shutil.copy(before, folder / "checkpoint_last.pt")
    assert differences(whole.path, lab.train(*given, updates=4, save=folder).path) == []
    main(["export", "--path", str(whole.path), "--out", str(tmp_path / "file.safetensors")])
    assert read(tmp_path / "file.safetensors").manifest.format_version == 6
    assert lab.eval_lm(tmp_path / "file.safetensors") == pytest.approx(whole.ppl, rel=1e-5)


def test_in_half_precision_with_flat_masters_too(lab, runs):
    given = flags(lab, runs, codes={"kind": "train", "every": 2, "share": 0.5}, tuning={"stages": "joint"})
    given += ["--fp16", "--save-interval-updates", 1]
    whole, folder = lab.train(*given), lab.new()
    assert {w.latent_weight.dtype for w in trained_weights(whole.model).values()} == {torch.float16}
    assert all(w.latent_weight.dtype != w.latent_factor.dtype for w in trained_weights(whole.model).values())
    folder.mkdir()
    (before,) = whole.folder.glob("checkpoint_*_3.pt")
    shutil.copy(before, folder / "checkpoint_last.pt")
    assert changed(before, whole.path) > 0
    assert differences(whole.path, lab.train(*given, save=folder).path) == []


def test_stages_in_turn_train_their_codes_one_after_the_other(lab, runs):
    rules = [{**FFN, "updates": 2}, {**WORD_VECTORS, "updates": 4}]
    run = lab.train(*flags(lab, runs, stages=rules, codes="train"), "--save-interval-updates", 1)
    folder = run.folder
    assert changed(folder / "checkpoint_1_1.pt", folder / "checkpoint_1_1.pt") == 0
    assert codes_of(folder / "checkpoint_1_1.pt").keys() < codes_of(run.path).keys()


@pytest.mark.parametrize("option", ["--ipq-codes", "--ipq-stages"])
def test_the_command_line_says_it_in_place_of_the_plan(lab, runs, begun, option):
    given = {"--ipq-codes": "train", "--ipq-stages": "joint"}[option]
    run = lab.train(*flags(lab, runs), option, given)
    assert bool(trained_weights(run.model)) == (option == "--ipq-codes")
    assert (("rebuild", 1, 0) in begun) == (option == "--ipq-codes") or begun[-1] == ("rebuild", 1, 0)
    plan = state_of(run.path)["extra_state"]["quant_noise_stages"]["plan"]
    assert plan.get("codes") == ({"kind": "train"} if option == "--ipq-codes" else None)
    assert plan.get("tuning") == ({"stages": "joint"} if option == "--ipq-stages" else None)


def test_the_command_line_gives_the_learning_rate_of_the_latent_weights(lab, runs):
    run = lab.train(*flags(lab, runs, **TRAINED), "--ipq-codes-lr", 3)
    assert {weight.factor for weight in trained_weights(run.model).values()} == {3.0}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ipq-codes", "move"], "codes: unknown kind 'move'; known: fixed, train"),
        (["--ipq-stages", "all"], "tuning: unknown stages 'all'; known: in-turn, joint"),
        (["--ipq-encode", "back"], "encode: unknown kind 'back'; known: plain, feedback"),
        (["--ipq-codes-lr", "-1"], "codes: learning_rate is -1.0; give a number above 0"),
    ],
)
def test_an_unknown_word_is_refused(lab, runs, capsys, more, message):
    with pytest.raises(SystemExit):
        lab.train(*flags(lab, runs), *more)
    assert message in one_error(capsys.readouterr())


def test_a_run_cannot_go_on_with_codes_of_the_other_kind(lab, runs, capsys):
    run = lab.train(*flags(lab, runs, tuning={"stages": "joint"}), updates=2)
    with pytest.raises(SystemExit):
        lab.train(*flags(lab, runs, **TRAINED), updates=4, save=run.folder)
    message = one_error(capsys.readouterr())
    assert "was trained with codes: fixed, and the plan or --ipq-codes says train; give what it started with" in message


def test_ranks_with_other_codes_stop(lab, runs, monkeypatch, capsys):
    run = lab.train(*flags(lab, runs, **TRAINED), updates=2)
    seen = {}

    def check(tensors, when):
        seen.update(tensors)
        assert when == "after update 2"

    monkeypatch.setattr(code_training, "check_same", check)
    code_training.check_codes(run.trainer)
    assert seen.keys() == {f"{name}.codes" for name in trained_weights(run.model)}
    assert all(t.dtype == torch.uint8 for t in seen.values())
