"""`encode: feedback` in `quantize` and in trainings: the layers' inputs of a fairseq network, measured on data."""

import pytest
import torch
from lm_fixture import FFN, PLANS, both_kinds, ipq_flags, one_error, state_of
from torch import nn

from fairseq_quant_noise import quantize_
from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.layers import quantized_weights

INT3 = {"scheme": "int3"}
NET = {"stages": [{"match": ".*", "block_size": 4, "n_centroids": 16}]}
ALL = {"stages": [{"match": r"decoder\.(layers|embed).*", "block_size": 4, "n_centroids": 16}]}


def quantize(lab, path, plan, *flags):
    out = lab.new("packed.safetensors")
    main(["quantize", "--path", str(path), "--plan", lab.plan(plan), "--out", str(out), *flags])
    return out


@both_kinds
def test_every_weight_that_multiplies_has_its_inputs_measured(lab, runs, kind, capsys):
    """fairseq's attention, which can do without calling its projections, calls them meanwhile."""
    dense = runs.stock(kind).path
    out = quantize(lab, dense, PLANS[kind], "--encode", "feedback", "--calibration-data", str(lab.data))
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if " weighted, d " in line]
    assert lines
    assert all(", output error x" in line for line in lines if "self_attn" in line or ".fc" in line)
    assert read(out).manifest.plan["encode"] == {"kind": "feedback"}
    assert out.stat().st_size == pytest.approx(quantize(lab, dense, PLANS[kind]).stat().st_size, abs=100)
    lab.eval_lm(out)


def test_a_plan_and_its_option_do_the_same(lab, runs):
    dense, data = runs.stock("plain").path, ("--calibration-data", str(lab.data))
    by_plan = quantize(lab, dense, ALL | {"encode": "feedback"}, *data)
    by_option = quantize(lab, dense, ALL, "--encode", "feedback", *data)
    assert by_plan.read_bytes() == by_option.read_bytes()
    plain = quantize(lab, dense, ALL | {"encode": "feedback"}, "--encode", "plain")
    assert plain.read_bytes() == quantize(lab, dense, ALL).read_bytes()


def test_feedback_without_data_is_refused(lab, runs, capsys):
    with pytest.raises(SystemExit) as stopped:
        quantize(lab, runs.stock("plain").path, {"stages": [FFN], "encode": "feedback"})
    assert stopped.value.code == 2
    assert "encode: feedback measures the layers' inputs on data; give --calibration-data" in one_error(
        capsys.readouterr()
    )


@pytest.mark.parametrize("codes", ["fixed", "train"])
def test_a_training_feeds_errors_back_as_its_stage_begins(lab, runs, codes, caplog):
    def trained(*how):
        plan = lab.plan({"stages": [FFN], "codes": codes, **dict(how)})
        flags = ["--finetune-from-model", runs.stock("plain").path, "--quantization-config-path", plan, "--lr", "1e-9"]
        caplog.clear()
        run = lab.train(*flags, *ipq_flags("plain"), updates=1)
        said = [record.getMessage() for record in caplog.records if "] decoder.layers." in record.getMessage()]
        return {name: t for name, t in state_of(run.path)["model"].items() if name.endswith(".codes")}, said

    caplog.set_level("INFO")
    plain, fed = trained(), trained(("encode", "feedback"))
    assert not [line for line in plain[1] if ", output error x" in line]
    assert fed[1]
    assert all(", output error x" in line for line in fed[1])
    assert all(not torch.equal(plain[0][name], fed[0][name]) for name in plain[0])


def test_a_stage_without_such_a_product_is_encoded_plainly(lab, runs, caplog):
    caplog.set_level("INFO")
    rule = {"match": FFN["match"], "scheme": "int8", "range": "histogram"}
    plan = lab.plan({"stages": [rule], "encode": "feedback"})
    flags = ["--finetune-from-model", runs.stock("plain").path, "--quantization-config-path", plan]
    lab.train(*flags, *ipq_flags("plain"), updates=1)
    note = "note: without error feedback in stage 1 of 1, where no product's inputs were measured"
    assert note in [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("range_", ["channel", "learned-channel"])
def test_a_training_of_integers_begins_where_feedback_put_them(lab, runs, range_, caplog):
    """Their codes stay as they are while the learning rate is next to nothing; in half precision too."""
    caplog.set_level("INFO")
    plan = lab.plan({"stages": [FFN | INT3 | {"range": range_}], "encode": "feedback"})
    flags = ["--finetune-from-model", runs.stock("plain").path, "--quantization-config-path", plan, "--lr", "1e-9"]
    trained = lab.train(*flags, *ipq_flags("plain"), "--bf16", updates=2).path
    said = [record.getMessage() for record in caplog.records if "] decoder.layers." in record.getMessage()]
    assert said
    assert all(", error feedback, output error x0." in line for line in said)
    weights = state_of(trained)["model"]
    numbers = weights["decoder.layers.0.fc1.weight"].float()
    assert all(len(row.round(decimals=3).unique()) <= 8 for row in numbers)  # at most 2^3 in a row


def test_the_weights_behind_codes_that_train_begin_where_feedback_put_them():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 64)), torch.randn(64, 16) @ torch.randn(16, 16)
    quantize_(model, {**NET, "encode": "feedback", "codes": "train"}, calibration=[x], progress=str)
    (weight,) = quantized_weights(model).values()
    assert weight.error()[0] == 0
    assert weight.encode_again() == 0


def test_weights_that_feedback_won_nothing_for_keep_their_numbers_behind_codes_that_train():
    """0 has inputs without correlations; 1 and 2 share a codebook, and the inputs of 2 are unknown."""
    torch.manual_seed(0)
    model, said, x = nn.Sequential(*(nn.Linear(16, 64) for _ in range(3))), [], torch.randn(64, 16)
    dense = [layer.weight.detach().clone() for layer in model]
    rule = NET["stages"][0]
    plan = {
        "stages": [rule | {"match": "0"}, rule | {"match": "[12]", "codebook": "shared"}],
        "encode": "feedback",
        "codes": "train",
    }
    moments = {"0.weight": torch.eye(16), "1.weight": x.t() @ x}
    quantize_(model, plan, inputs=moments, progress=said.append)
    for weight, numbers in zip(quantized_weights(model).values(), dense, strict=True):
        assert torch.equal(weight.latent_weight * weight.factor, numbers)
    assert "note: without error feedback, since no product's inputs were measured: 1, 2" in said
