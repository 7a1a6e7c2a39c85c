"""`quantize --encode feedback`: the layers' inputs of a fairseq network, measured on data."""

import pytest
from lm_fixture import FFN, PLANS, both_kinds, one_error
from toys import refuses

from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.plugin.training.stages import StageController

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


def test_a_training_with_such_a_plan_is_refused(lab):
    with refuses("encode: feedback is for `fairseq-quant-noise quantize`, which does not train afterwards"):
        StageController(lab.plan({"stages": [FFN], "encode": "feedback"}), 0, 100)
