"""The optimizer's memory across a stage, on fairseq's own optimizers of every precision."""

import pytest
import torch
from half import PRECISIONS, across_a_stage, build, every_optimizer, every_precision, memory, network, step, warmed_up
from lm_fixture import PLANS, same, state_of
from toys import refuses

from fairseq_quant_noise.checkpoints.checkpoint import Checkpoint
from fairseq_quant_noise.checkpoints.safe_load import safe_load
from fairseq_quant_noise.plugin.training import stages as training
from fairseq_quant_noise.plugin.training.optimizer import adam_moments, carry_over
from fairseq_quant_noise.plugin.training.stages import StageController

pytestmark = pytest.mark.usefixtures("flattens")


@every_precision
def test_old_parameters_go_on_as_if_nothing_were_new_and_new_ones_as_if_nothing_were_old(lab, precision):
    for name in every_optimizer(precision):
        quantized, optimizer = across_a_stage(lab, name, precision)
        fresh = network(precision, ("new",))
        alone = build(lab, name, precision, list(fresh.values()))
        copied = network(precision, ("first", "old", "last"))
        uninterrupted = build(lab, name, precision, list(copied.values()))
        warmed_up(uninterrupted, copied)
        for of, net in ((optimizer, quantized), (alone, fresh), (uninterrupted, copied)):
            of.set_lr(0.003)
            step(of, net, range(5, 12))
        seen = memory(optimizer, quantized)
        assert same(seen["new"], memory(alone, fresh)["new"]), name
        kept = memory(uninterrupted, copied)
        assert all(same(seen[old], kept[old]) for old in ("old", "last")), name
        assert all(torch.equal(quantized[old], copied[old]) for old in ("old", "last")), name


def test_under_a_steady_gradient_each_step_of_new_centroids_is_the_learning_rate(lab):
    """With the old parameters' count of steps they would be up to 1.55 times as long; with beta2 .999, 6.6 times."""
    model, optimizer = across_a_stage(lab, "adam", "fp16", updates=300)
    rate, lengths = optimizer.get_lr(), []
    for _ in range(30):
        before = memory(optimizer, model)["new"]["stepped"]
        step(optimizer, model, [300])
        moved = (memory(optimizer, model)["new"]["stepped"] - before).abs()
        lengths.append(float(moved.median() / rate))
    assert lengths == pytest.approx([1] * 30, abs=0.05)


@every_precision
def test_second_moments_have_the_shapes_of_their_parameters(lab, precision):
    model = network(precision, ("first", "old", "last"))
    optimizer = build(lab, "adam", precision, list(model.values()))
    step(optimizer, model, range(3))
    found, kept = adam_moments(model, optimizer), memory(optimizer, model)
    assert {name: tensor.shape for name, tensor in found.items()} == {name: p.shape for name, p in model.items()}
    assert all(torch.equal(found[name], kept[name]["exp_avg_sq"]) for name in model)
    assert all(bool((tensor > 0).all()) for tensor in found.values())


def test_apexs_count_of_steps_for_all_weights_is_refused(lab):
    """A stand-in by the name that fairseq gives it: apex needs a GPU."""
    model = network("fp32", ("old",))
    old, new = (build(lab, "adam", "fp32", list(model.values())) for _ in range(2))
    new._optimizer.__class__ = type("FusedAdamV2", (type(new._optimizer),), {})
    with refuses(
        "^--optimizer adam: apex's FusedAdam counts the steps of all weights together, .* give --use-old-adam"
    ):
        carry_over(old, new)


# Inside fairseq-train.

ATTENTION_LAST = {"stages": [PLANS["plain"]["stages"][i] for i in (0, 2)]}  # the embedding stays dense


@pytest.fixture
def weighed(monkeypatch):
    """The importance of every weight that a stage quantized, by name."""
    seen, quantize = {}, training.quantize_targets

    def spy(targets, *, importance, **settings):
        names = {target.weight.tensor_name for target in targets}
        seen.update({name: tensor.clone() for name, tensor in importance.items() if name in names})
        quantize(targets, importance=importance, **settings)

    monkeypatch.setattr(training, "quantize_targets", spy)
    return seen


@pytest.fixture
def survived(monkeypatch):
    """(before, after) of every stage: what the optimizer keeps of each parameter."""
    seen, rebuild = [], StageController._rebuild_optimizer

    def kept(trainer):
        return memory(trainer.optimizer, dict(trainer.get_model().named_parameters()))

    def quantize(controller, stage, of=StageController._quantize_stage):
        seen.append([kept(controller.trainer)])
        of(controller, stage)

    def spy(controller, first):
        rebuild(controller, first)
        seen[-1].append(kept(controller.trainer))

    monkeypatch.setattr(StageController, "_quantize_stage", quantize)
    monkeypatch.setattr(StageController, "_rebuild_optimizer", spy)
    return seen


def steps_of(run):
    """How many steps the optimizer counts for each parameter."""
    kept = memory(run.trainer.optimizer, dict(run.model.named_parameters()))
    return {name: int(entry["step"]) for name, entry in kept.items()}


@pytest.mark.upstream(20)
@pytest.mark.parametrize("name", [name for name in PRECISIONS if name != "memory-efficient bf16"])
def test_stages_in_every_precision(lab, weighed, survived, name, request):
    """Two updates without a plan, then stages after updates 2 and 4 of 6, and once more from update 3."""
    if name == "fp16":
        request.getfixturevalue("flat")
    flags = [*PRECISIONS[name], "--disable-validation"]
    dense = lab.train(*flags, updates=2)
    moments = {n: t.bfloat16() for n, t in adam_moments(dense.model, dense.trainer.optimizer).items()}
    assert same(Checkpoint(dense.path).moments, moments)

    staged = [*flags, "--quantization-config-path", lab.plan(ATTENTION_LAST), "--save-interval-updates", 1]
    run = lab.train(*staged, "--restore-file", dense.path, updates=6)
    assert len(weighed) == 12
    assert same(weighed, {n: moments[n] for n in weighed}), "k-means weighs by Adam's second moments"
    assert len(survived) == 2
    for before, after in survived:
        survivors, new = before.keys() & after.keys(), after.keys() - before.keys()
        assert len(survivors) > 20
        assert all("exp_avg_sq" in before[n] and same(before[n], after[n]) for n in survivors)
        assert new
        assert all(n.endswith(".centroids") and after[n].keys() == {"stepped"} for n in new)
    expected = {
        n: (4 if ".fc" in n else 2) if n.endswith(".centroids") else 6 for n in dict(run.model.named_parameters())
    }
    assert steps_of(run) == expected

    partly = safe_load(run.path)
    moments = {n: t.bfloat16() for n, t in adam_moments(run.model, run.trainer.optimizer).items()}
    assert same(Checkpoint(run.path, partly).moments, moments)
    resumed = lab.train(*staged, "--restore-file", run.folder / "checkpoint_1_3.pt", updates=6)
    assert steps_of(resumed) == expected
    ends = [state_of(r.path) for r in (run, resumed)]
    assert same(ends[0]["model"], ends[1]["model"])
    assert same(ends[0]["last_optimizer_state"], ends[1]["last_optimizer_state"])
