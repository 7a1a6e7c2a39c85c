"""int4 and int8 in fairseq-train: as stages, with --quant-noise-scalar, with iPQ; activations; the file; resume."""

import copy
import functools

import pytest
import torch
from lm_fixture import ATTENTION, FFN, PLANS, both_kinds, one_error, same, state_of
from toys import refuses

import fairseq_quant_noise
from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.layers import IntWeight, LatentIntWeight, PQWeight, input_quantizers, quantized_weights
from fairseq_quant_noise.noise import noise_of
from fairseq_quant_noise.plugin.batches import first_batches
from fairseq_quant_noise.scalar.ranges import histogram_range
from fairseq_quant_noise.weights.discovery import find_weights

INT4 = {"match": r"decoder\.layers\.\d+\.fc[12]", "scheme": "int4", "range": "histogram"}
INT8 = {"match": r"decoder\.embed_tokens.*", "scheme": "int8", "range": "channel"}
MIXED = {"stages": [INT4, INT8, ATTENTION], "centroids": {"dtype": "int8"}, "activations": {"bits": 8}}
RESUME = ["--save-interval-updates", 1, "--update-epoch-batch-itr", "True", "--batch-size", 64]


def exported(lab, run):
    """The packed file of a run's last checkpoint."""
    path = lab.new("model.safetensors")
    main(["export", "--path", str(run.path), "--out", str(path)])
    return path


def by_kind(lab, *flags, updates):
    """A function that gives the run of a kind of model, done when it is first asked for."""
    return functools.cache(lambda kind: lab.train(*flags, kind=kind, updates=updates))


@pytest.fixture(scope="module")
def mixed(lab):
    """Runs through int4, int8 and iPQ stages with int8 centroids and activations."""
    return by_kind(lab, "--quantization-config-path", lab.plan(MIXED), "--quant-noise-pq", 0.1, updates=7)


@pytest.fixture(scope="module")
def scalar(lab):
    """Runs with --quant-noise-scalar."""
    return by_kind(lab, "--quant-noise-scalar", 0.5, updates=6)


# Stages


@both_kinds
def test_each_weight_has_the_scheme_of_its_stage(mixed, kind):
    weights = quantized_weights(mixed(kind).model)
    assert len(weights) == len(find_weights(mixed(kind).model)) - (kind == "adaptive")  # the class projection stays
    for name, weight in weights.items():
        expected = "int4" if "fc" in name else "int8" if "embed" in name else "pq"
        assert weight.scheme == expected
        assert isinstance(weight, PQWeight if expected == "pq" else LatentIntWeight)


@pytest.mark.upstream(24)
@both_kinds
def test_training_the_checkpoint_and_the_file_have_one_score(lab, mixed, kind):
    run = mixed(kind)
    path = exported(lab, run)
    assert lab.eval_lm(run.path) == pytest.approx(lab.eval_lm(path), rel=1e-6)
    if kind == "plain":
        assert run.ppl == pytest.approx(lab.eval_lm(path), rel=1e-5)
    assert {entry.scheme for entry in read(path).manifest.tensors.values()} == {"int4", "int8", "pq"}


@both_kinds
@pytest.mark.parametrize("how", ["stages", "--quant-noise-scalar"])
def test_ranges_are_those_of_the_saved_weights_in_evaluation_mode(mixed, scalar, kind, how):
    """Not of weights that have gone since, nor under dropout and noise: the mean over batches of the training data."""
    run = (mixed if how == "stages" else scalar)(kind)
    saved = {name: t for name, t in state_of(run.path)["model"].items() if name.endswith("input_quantizer.range")}
    model, criterion = copy.deepcopy(run.model).eval(), run.trainer.get_criterion().eval()
    quantizers, found = input_quantizers(model), {}
    for name, quantizer in quantizers.items():
        quantizer.calibrating = True  # it passes its input on as it is
        quantizer.register_forward_hook(lambda q, x, y, name=name: found.setdefault(name, []).append(y))
    with torch.no_grad():
        for sample in first_batches(run.trainer, run.trainer.quant_noise_epoch, 8):
            criterion(model, sample)
    assert len(saved) == len(found) == len(quantizers) > 4
    for name, inputs in found.items():
        assert 1 < len(inputs) <= 8
        mean = torch.stack([torch.cat(histogram_range(x, 8)) for x in inputs]).mean(0)
        torch.testing.assert_close(saved[f"{name}.input_quantizer.range"], mean)


@both_kinds
def test_the_file_loads_without_fairseq_into_codes(lab, mixed, kind):
    path = exported(lab, mixed(kind))
    network = fairseq_quant_noise.load(path)
    theirs = lab.load(path)
    assert {IntWeight, PQWeight} == {type(weight) for weight in quantized_weights(network).values()}
    tokens = torch.randint(4, 100, (3, 9))
    ours = network(tokens)
    expected = theirs.get_normalized_probs(theirs(tokens), log_probs=True)
    torch.testing.assert_close(ours.log_softmax(-1), expected, rtol=1e-4, atol=1e-4)


@both_kinds
def test_every_product_with_a_quantized_weight_has_its_input_in_8_bits(mixed, kind):
    quantizers = input_quantizers(mixed(kind).model)
    assert all(int(q.seen) > 0 and q.range[0] <= q.range[1] and q.range.any() for q in quantizers.values())
    layers = {
        f"decoder.layers.{i}.{n}" for i in range(2) for n in ("fc1", "fc2", "self_attn.q_proj", "self_attn.out_proj")
    }
    assert layers < set(quantizers)
    softmax = "output_projection" if kind == "plain" else "adaptive_softmax.head.word_proj"
    assert f"decoder.{softmax}" in quantizers
    assert not any(name.endswith("embed_tokens") for name in quantizers)


def test_a_dense_weight_keeps_its_name_in_the_checkpoint(lab, mixed):
    names = set(state_of(mixed("plain").path)["model"])
    assert {"decoder.layers.0.fc1.weight", "decoder.layers.0.fc1.weight.scalar"} <= names
    assert "decoder.layers.0.fc1.weight.latent" not in names
    assert "decoder.layers.0.fc1.input_quantizer.range" in names


def test_a_weight_in_its_stage_goes_on_training_with_the_optimizers_memory(lab):
    dense = lab.train(updates=2)
    flags = ["--quantization-config-path", lab.plan({"stages": [INT4]}), "--restore-file", dense.path]
    run = lab.train(*flags, updates=4)
    weight = quantized_weights(run.model)["decoder.layers.0.fc1"]
    state = run.trainer.optimizer.optimizer.state[weight.latent]
    assert state["step"] == 4
    assert not torch.equal(weight.latent, dense.model.decoder.layers[0].fc1.weight)


@pytest.mark.parametrize("at", ["1_1", "2_3", "3_5"])
def test_a_run_resumed_in_any_stage_ends_with_the_same_bits(lab, mixed_whole, at):
    flags, whole = mixed_whole
    resumed = lab.train(*flags, "--restore-file", whole.folder / f"checkpoint_{at}.pt", updates=8)
    assert same(state_of(resumed.path)["model"], state_of(whole.path)["model"])


@pytest.fixture(scope="module")
def mixed_whole(lab):
    """A run that was not interrupted, and its flags."""
    flags = ["--quantization-config-path", lab.plan(MIXED), "--quant-noise-pq", 0.1, *RESUME]
    return flags, lab.train(*flags, updates=8)


# Noise that remembers


NOISES = {
    "codebooks": {"kind": "pq", "p": 0.3, "n_centroids": 8, "refresh": "epoch"},
    "clusters": {"kind": "proxy", "p": 0.3, "n_centroids": 8, "choice": "clusters", "refresh": 3},
    "histograms": {"kind": "int4", "p": 0.5, "range": "histogram", "refresh": 4},
    "a schedule": {"kind": "proxy", "p": 0.5, "schedule": {"kind": "linear", "from": 0.0, "updates": 8}},
}


@pytest.mark.parametrize("name", NOISES)
def test_a_resumed_run_makes_the_noise_it_would_have_made(lab, name):
    flags = ["--quantization-config-path", lab.plan({"noise": [{"match": ".*", **NOISES[name]}]}), *RESUME]
    whole = lab.train(*flags, updates=8)
    resumed = lab.train(*flags, "--restore-file", whole.folder / "checkpoint_3_5.pt", updates=8)
    assert same(state_of(resumed.path)["model"], state_of(whole.path)["model"])


def test_codebooks_are_found_anew_each_epoch(lab):
    flags = ["--quantization-config-path", lab.plan({"noise": [{"match": ".*", **NOISES["codebooks"]}]})]
    run = lab.train(*flags, "--batch-size", 64, updates=12)
    epoch = noise_of(run.model).epoch
    assert epoch > 2
    assert {rule.fitted for noise in noise_of(run.model).weights.values() for rule in noise.rules} == {epoch}


def test_fairseq_tells_the_noise_which_update_it_is(lab):
    run = lab.train("--quant-noise-pq", 0.2, "--quant-noise-schedule", "cosine:0:4", "--update-freq", 2, updates=3)
    assert noise_of(run.model).update == 2
    assert noise_of(run.model).draws > 3


# --quant-noise-scalar, as fairseq documents it


@pytest.mark.upstream(14)
@both_kinds
def test_validation_under_quant_noise_scalar_is_that_of_int8(lab, scalar, kind):
    """fairseq: all quantized modules switch to p = 1 when the network is evaluated."""
    run = scalar(kind)
    path = exported(lab, run)
    assert lab.eval_lm(run.path) == pytest.approx(lab.eval_lm(path), rel=1e-6)
    if kind == "plain":
        assert run.ppl == pytest.approx(lab.eval_lm(path), rel=1e-5)
    schemes = {entry.scheme for entry in read(path).manifest.tensors.values()}
    assert schemes == {"int8"}
    assert len(read(path).manifest.tensors) == len(find_weights(run.model))


@pytest.mark.upstream(17)
@both_kinds
def test_the_ranges_of_activations_are_in_the_checkpoint(lab, scalar, kind):
    state = state_of(scalar(kind).path)["model"]
    loaded = input_quantizers(lab.load(scalar(kind).path))
    assert loaded
    for name, quantizer in loaded.items():
        assert torch.equal(quantizer.range, state[f"{name}.input_quantizer.range"])
        assert quantizer.range.any()


def test_half_of_the_numbers_are_noised_in_training(lab):
    model = lab.model("--quant-noise-scalar", 0.5).train()
    fc1 = model.decoder.layers[0].fc1
    dense = quantized_weights(model)["decoder.layers.0.fc1"].latent
    seen = []
    fc1.register_forward_pre_hook(lambda module, inputs: seen.append(module.weight.detach().clone()))
    model(torch.randint(4, 100, (2, 8)))
    share = (seen[0] != dense).float().mean().item()
    assert abs(share - 0.5) < 0.06


def test_a_stock_checkpoint_goes_on_with_quant_noise_scalar(lab, runs):
    flags = ["--finetune-from-model", runs.stock("plain").path, "--quant-noise-scalar", 0.5]
    run = lab.train(*flags, updates=2)
    assert all(isinstance(weight, LatentIntWeight) for weight in quantized_weights(run.model).values())


def test_a_scalar_checkpoint_as_stock_has_the_values_of_its_codes(lab, scalar):
    path = lab.new("dense.pt")
    main(["to-dense", str(scalar("plain").path), "--out", str(path)])
    state = state_of(path)
    ours = quantized_weights(lab.load(scalar("plain").path))["decoder.layers.0.fc1"]
    assert torch.equal(state["model"]["decoder.layers.0.fc1.weight"], ours.decode())
    assert state["cfg"]["model"]["quant_noise_scalar"] == 0
    assert not [name for name in state["model"] if "quantizer" in name or name.endswith((".scalar", ".affine"))]
    assert "quant_noise_kind" not in state["cfg"]["model"]


# One-shot


@both_kinds
def test_quantize_calibrates_activations_on_data(lab, runs, kind):
    out = lab.new("one-shot.safetensors")
    stages = [{"match": ".*", "scheme": "int8", "range": "channel"}]
    plan = lab.plan({"stages": stages, "activations": {"calibration_batches": 4}})
    flags = ["--path", str(runs.stock(kind).path), "--plan", plan, "--out", str(out)]
    main(["quantize", *flags, "--calibration-data", str(lab.data)])
    ranges = read(out).manifest.inputs
    assert ranges
    assert all(entry["low"] < entry["high"] for entry in ranges.values())
    assert lab.eval_lm(out) == pytest.approx(lab.eval_lm(runs.stock(kind).path), rel=0.02)


def test_activations_without_data_are_refused(lab, runs, capsys):
    plan = lab.plan({"stages": [FFN], "activations": {}})
    flags = ["--path", str(runs.stock("plain").path), "--plan", plan, "--out", str(lab.new("x.safetensors"))]
    for extra, message in (([], "give --calibration-data"), (["--calibration-data", "/nowhere"], "no such folder")):
        with pytest.raises(SystemExit) as stopped:
            main(["quantize", *flags, *extra])
        assert stopped.value.code == 2
        assert message in one_error(capsys.readouterr())


def test_both_noise_flags_are_refused(lab):
    with refuses("give one"):
        lab.model("--quant-noise-pq", 0.1, "--quant-noise-scalar", 0.1)


def test_the_plan_of_a_pq_run_counts_int8_centroids(lab, runs, capsys):
    for dtype, per_number in (("fp16", 2), ("int8", 1)):
        plan = lab.plan({**PLANS["plain"], "centroids": {"dtype": dtype}})
        out = lab.new(f"{dtype}.safetensors")
        main(["quantize", "--path", str(runs.stock("plain").path), "--plan", plan, "--out", str(out)])
        packed = read(out)
        centroids = packed.tensors["decoder.layers.0.fc1.weight.centroids"]
        assert centroids.numel() * centroids.element_size() == 16 * 8 * per_number


def test_quant_noise_scalar_with_stages_is_refused_before_training(lab, capsys):
    with pytest.raises(SystemExit):
        lab.train("--quant-noise-scalar", 0.5, "--quantization-config-path", lab.plan(PLANS["plain"]))
    assert "--quant-noise-scalar makes every weight int8" in one_error(capsys.readouterr())
