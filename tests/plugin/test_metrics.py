"""The noise's measurements in fairseq's log."""

import math
from unittest import mock

import pytest
import torch
from lm_fixture import ATTENTION, FFN, PLANS, WORD_VECTORS, batch, both_kinds

from fairseq_quant_noise import quantize_
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.layers import quantized_weights
from fairseq_quant_noise.noise import noise_of
from fairseq_quant_noise.noise.measure import Probe, kind_of
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.plugin.training.gap import noise_plan
from fairseq_quant_noise.quantization.quantize import quantized_values, swapped
from fairseq_quant_noise.quantization.targets import resolve_stages


def measured(model, forward):
    """What a Probe finds in one forward."""
    found = {}
    Probe(model, found.update)
    forward()
    return found


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("decoder.layers.0.fc1", "fc1"),
        ("decoder.layers.11.self_attn.q_proj", "self_attn"),
        ("decoder.embed_tokens.embeddings.0.0", "embeddings"),
        ("decoder.adaptive_softmax.head.class_proj", "head"),
        ("fc", "fc"),
        ("", "model"),
    ],
)
def test_kinds_of_layers(name, kind):
    assert kind_of(name) == kind


@both_kinds
def test_weights_lose_the_square_root_of_p_to_proxy_noise(lab, kind):
    model = lab.model("--quant-noise-pq", 0.2, "--dropout", 0.1, kind=kind).train()
    torch.manual_seed(1)  # the smallest layer has eight blocks: with some seeds none is hit
    found = measured(model, lambda: model(**batch()["net_input"]))
    assert {"fc1", "fc2", "self_attn"} <= set(found)
    for distortion in found.values():
        assert distortion.of_weight in (None, pytest.approx(math.sqrt(0.2), abs=0.12))  # None: a tied copy
    for layer in ("fc1", "fc2", "self_attn"):
        assert 0.02 < found[layer].of_output < 1.5


def test_the_measurement_changes_neither_the_forward_nor_the_random_numbers(lab):
    outputs = []
    for probed in (False, True):
        model = lab.model("--quant-noise-pq", 0.3, "--dropout", 0.3, "--decoder-layerdrop", 0.2).train()
        torch.manual_seed(7)
        if probed:
            Probe(model, lambda found: None)
        first = model(**batch()["net_input"])[0]
        first.sum().backward()
        grads = [p.grad for p in model.parameters()]
        outputs.append([first.detach(), *grads, model(**batch()["net_input"])[0].detach()])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True) if a is not None)


def test_outputs_are_compared_on_the_same_input_without_other_noise(lab):
    model = lab.model("--quant-noise-pq", 1.0, "--dropout", 0.5).train()
    for layer in model.decoder.layers:
        layer.fc1.bias.data.zero_()  # so that all of the output is the weight's
    found = measured(model, lambda: model(**batch()["net_input"]))
    assert found["fc1"].of_weight == pytest.approx(1.0)
    assert found["fc1"].of_output == pytest.approx(1.0)


def test_a_probe_measures_once_and_leaves_no_hook(lab):
    model = lab.model("--quant-noise-pq", 0.2).train()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    seen = []
    Probe(model, seen.append)
    for _ in range(2):
        model(**batch()["net_input"])
    assert len(seen) == 1
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_forward_that_fails_says_why_and_the_next_one_is_measured(lab):
    model = lab.model("--quant-noise-pq", 0.2).train()
    seen = []
    Probe(model, seen.append)
    with pytest.raises(IndexError):
        model(torch.full((1, 3), 10_000))
    assert not seen
    model(**batch()["net_input"])
    assert "fc1" in seen[0]


def test_weights_that_are_quantized_before_the_forward_are_left_out(lab):
    model = lab.model("--quant-noise-pq", 0.2, "--quant-noise-pq-block-size", 4).train()
    seen = []
    Probe(model, seen.append)
    quantize_(model, {"stages": [{"match": r".*fc[12]", "block_size": 8}]})
    model(**batch()["net_input"])
    assert "fc1" not in seen[0]
    assert "self_attn" in seen[0]


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("proxy", ("pq", 8, 16)),
        ("mean", ("pq", 8, 16)),
        ("pq,int8", ("pq", 8, 8)),
        ("int4", ("int4", None, 16)),
    ],
)
def test_the_plan_that_noise_prepares_for(lab, kind, target):
    model = lab.model("--quant-noise-pq", 0.1, "--quant-noise-kind", kind)
    plan = noise_plan(model)
    assert len(plan.stages) == len(noise_of(model).weights)
    assert {(t.rule.scheme, t.block_size, t.centroid_bits) for t in resolve_stages(plan, model)} == {target}


SHARED = {"stages": [{**rule, "codebook": "shared"} for rule in PLANS["plain"]["stages"]]}
QUANTIZED = {
    "weighted": PLANS["plain"],
    "unweighted": {**PLANS["plain"], "centroids": {"weighted": False}},
    "shared codebooks": SHARED,
    "int8 centroids": {**SHARED, "centroids": {"dtype": "int8"}},
    "intN": {
        "stages": [{**FFN, "scheme": "int4", "range": "channel"}, {"match": ".*embed.*|.*attn.*", "scheme": "int8"}]
    },
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_values_are_those_of_a_network_that_is_quantized_and_are_put_back(lab, name):
    plan = Plan.of(QUANTIZED[name])
    model, quantized = lab.model().eval(), lab.model().eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    counts = {name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters()}
    given = counts if plan.centroids.weighted else {}
    quantize_(quantized, plan, seed=3, importance=given)
    values = quantized_values(resolve_stages(plan, model), seed=3, importance=given)
    with swapped(values), torch.no_grad():
        inside = {name: model.get_submodule(name).weight.clone() for name in quantized_weights(quantized)}
        assert all(torch.equal(inside[name], w.decode()) for name, w in quantized_weights(quantized).items())
        assert model.decoder.output_projection.weight is model.decoder.embed_tokens.weight
    assert len(inside) == len(values) == 13
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


GAP = ["--quant-noise-gap-batches", 1000]


def test_the_gap_is_what_quantizing_the_checkpoint_costs(lab):
    run = lab.train("--quant-noise-pq", 0.1, *GAP, "--validate-interval", 99, updates=40)
    out = lab.new("one-shot.safetensors")
    plan = lab.plan({"stages": [{"match": ".*", "block_size": 8}]})
    main(["quantize", "--path", str(run.path), "--plan", plan, "--out", str(out), "--seed", "3"])
    valid = run.valid[-1]
    assert valid["quantized_loss"] == pytest.approx(math.log2(lab.eval_lm(out)), abs=1e-3)
    assert valid["quantization_gap"] == pytest.approx(valid["quantized_loss"] - valid["loss"], abs=1e-3)
    assert valid["quantization_gap"] > 0.02


@pytest.mark.parametrize("name", ["weighted", "unweighted", "int8 centroids"])
def test_the_gap_is_what_the_next_stage_costs(lab, runs, name):
    """Nothing is learned, so that the network differs by the stage alone."""
    plan = QUANTIZED[name]
    both = {**WORD_VECTORS, "match": rf"{WORD_VECTORS['match']}|{ATTENTION['match']}", "block_size": 4}
    stages = [{**FFN, "updates": 2}, {**both, "codebook": plan["stages"][0].get("codebook", "own"), "updates": 1}]
    flags = ["--quantization-config-path", lab.plan({**plan, "stages": stages}), *GAP, "--lr", 0]
    flags += ["--finetune-from-model", runs.stock("plain").path, "--validate-interval-updates", 1]
    before, after, _ = lab.train(*flags, updates=3).valid
    assert before["quantized_loss"] == pytest.approx(after["loss"], abs=1e-3)


@both_kinds
def test_training_logs_the_distortion_and_validation_the_gap(lab, kind):
    flags = ["--quant-noise-pq", 0.2, "--quant-noise-log-interval", 2, "--quant-noise-gap-batches", 2]
    with mock.patch("fairseq.logging.progress_bar.NoopProgressBar.log") as log:
        run = lab.train(*flags, "--log-interval", 1, kind=kind, updates=4)
    lines = [call.args[0] for call in log.call_args_list]
    measured = [[value for name, value in line.items() if name.startswith("distortion_")] for line in lines]
    assert [bool(values) for values in measured] == [True, False, True, False]  # absent, not None
    assert all(value > 0 for values in measured for value in values)
    valid = run.valid[-1]
    assert valid["quantization_gap"] == pytest.approx(valid["quantized_loss"] - valid["loss"], abs=0.2)
    assert noise_of(run.model) is not None


@pytest.mark.parametrize("noise", [[], [{"match": ".*", "p": 0.0}]], ids=["no noise", "noise"])
def test_the_gap_is_that_of_the_stages_that_are_still_to_come(lab, noise):
    gaps = []
    for scheme in ("int8", "int2"):
        first = {**FFN, "updates": 2}
        last = {"match": r"decoder\.(embed|layers.*self_attn).*", "scheme": scheme, "updates": 2}
        flags = ["--quantization-config-path", lab.plan({"noise": noise, "stages": [first, last]})]
        flags += ["--quant-noise-gap-batches", 2, "--validate-interval-updates", 1, "--batch-size", 64]
        run = lab.train(*flags, updates=3)
        gaps.append([log.get("quantization_gap") for log in run.valid])
    assert all(len(of_run) == 3 for of_run in gaps)
    assert [of_run[2] for of_run in gaps] == [None, None]  # nothing is dense any more
    assert abs(gaps[0][0]) < 0.01 < gaps[1][0]


def test_without_the_option_nothing_is_quantized_for_the_log(lab, runs):
    assert "quantization_gap" not in runs.noised("plain").valid[-1]
