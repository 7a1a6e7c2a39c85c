"""RoBERTa through the verbs: every program reads what they write with the score that training reported."""

from argparse import Namespace

import pytest
import torch
from lm_fixture import state_of
from roberta_fixture import (
    CLASSES,
    ENCODER,
    HEAD,
    INT8,
    MASKED,
    PLAN,
    SENTENCES,
    both_tasks,
    plan_of,
    roberta,  # noqa: F401
    roberta_batch,
)

import fairseq_quant_noise
from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.checkpoints.checkpoint import Checkpoint
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.layers import input_quantizers, quantized_weights


def verb(*arguments):
    main(list(map(str, arguments)))


def logits(network, kind):
    """Of our network without fairseq, or of fairseq's, on one batch."""
    name = HEAD if kind == SENTENCES else None
    with torch.no_grad():
        scores = network(roberta_batch(kind)["net_input"]["src_tokens"], classification_head_name=name)
    return scores[0] if isinstance(scores, tuple) else scores


def check_file(lab, packed, checkpoint, kind):
    """A file's network, here and in fairseq, is that of the checkpoint."""
    expected = logits(lab.load(checkpoint, kind), kind)
    torch.testing.assert_close(logits(lab.load(packed, kind), kind), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(fairseq_quant_noise.load(packed), kind), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "kind"), [("scalar", MASKED), ("scalar", SENTENCES), ("ipq", SENTENCES)])
def test_export_evaluates_as_training_said(roberta, kind, name):  # noqa: F811
    run, out, dense = roberta.run(name, kind), roberta.new("packed.safetensors"), roberta.new("dense.pt")
    verb("export", "--path", run.path, "--out", out)
    check_file(roberta, out, run.path, kind)
    for path in (run.path, out):
        assert roberta.validate(path, kind)["loss"] == pytest.approx(run.valid[-1]["loss"], rel=1e-5)
    assert out.stat().st_size < 0.5 * run.path.stat().st_size
    verb("to-dense", out, "--out", dense)
    stock = roberta.load(dense, kind)
    assert type(stock).__name__ == "RobertaModel"
    if name == "ipq":  # of int8, the rounded activations have no place in a stock checkpoint
        assert roberta.validate(dense, kind)["loss"] == pytest.approx(run.valid[-1]["loss"], rel=1e-5)


@both_tasks
def test_a_stock_checkpoint_is_quantized_in_one_go(roberta, kind):  # noqa: F811
    stock, out = roberta.run("stock", kind).path, roberta.new("packed.safetensors")
    verb("quantize", "--path", stock, "--plan", roberta.plan(plan_of(kind)), "--out", out)
    packed = read(out)
    heads = {HEAD: [32, CLASSES]} if kind == SENTENCES else {}
    assert packed.manifest.model["cfg"]["model"]["classification_heads"] == heads
    assert str(roberta.folder) not in str(packed.manifest.model["cfg"]["model"])
    network = fairseq_quant_noise.load(out)
    torch.testing.assert_close(logits(network, kind), logits(roberta.load(out, kind), kind), atol=1e-5, rtol=1e-5)
    assert network.config.max_positions == 40 if kind == SENTENCES else 32


def test_int8_with_activations_from_data(roberta):  # noqa: F811
    """The language model's head has no part in sentence prediction, so no data reach it."""
    stage = {"match": r"(?!encoder\.lm_head).*", "scheme": "int8"}
    plan = roberta.plan({"stages": [stage], "activations": {"range": "tensor"}})
    run, out = roberta.run("stock", SENTENCES), roberta.new("packed.safetensors")
    verb("quantize", "--path", run.path, "--plan", plan, "--out", out, "--calibration-data", roberta.of(SENTENCES))
    network = fairseq_quant_noise.load(out)
    assert f"classification_heads.{HEAD}.out_proj" in input_quantizers(network)
    assert roberta.validate(out, SENTENCES)["loss"] == pytest.approx(run.valid[-1]["loss"], rel=0.02)


def test_a_head_in_codes_with_activations_from_data(roberta):  # noqa: F811
    """fairseq's own model, which finds the ranges, looks for the `weight` of every head in what it loads."""
    plan = roberta.plan({"stages": [PLAN["stages"][2]], "activations": {"range": "tensor"}})
    run, out = roberta.run("stock", SENTENCES), roberta.new("packed.safetensors")
    verb("quantize", "--path", run.path, "--plan", plan, "--out", out, "--calibration-data", roberta.of(SENTENCES))
    network = fairseq_quant_noise.load(out)
    names = [f"classification_heads.{HEAD}.{part}" for part in ("dense", "out_proj")]
    assert {*names} <= {*input_quantizers(network)} & {*quantized_weights(network)}
    torch.testing.assert_close(
        logits(network, SENTENCES), logits(roberta.load(out, SENTENCES), SENTENCES), atol=1e-5, rtol=1e-5
    )


def test_plan_of_a_checkpoint_lists_its_head(roberta, capsys):  # noqa: F811
    verb("plan", "--path", roberta.run("stock", SENTENCES).path, "--plan", roberta.plan(INT8))
    printed = capsys.readouterr().out
    assert f"classification_heads.{HEAD}.out_proj.weight" in printed
    assert f"{ENCODER}.embed_positions.weight" in printed


def published(state):
    """A checkpoint as fairseq published them: old names, one matrix for three projections, `args`."""
    old = {}
    for name, tensor in state["model"].items():
        name = name.replace("encoder.sent", "decoder.sent").replace("encoder.lm", "decoder.lm")
        old[name.replace("layernorm_embedding", "emb_layer_norm")] = tensor
    del old["decoder.sentence_encoder.version"]
    for i in range(2):
        attention = f"decoder.sentence_encoder.layers.{i}.self_attn"
        for last in ("weight", "bias"):
            parts = [old.pop(f"{attention}.{letter}_proj.{last}") for letter in "qkv"]
            old[f"{attention}.in_proj_{last}"] = torch.cat(parts)
    model = vars(state["cfg"]["model"])
    args = Namespace(**{**model, "arch": "roberta_base", "task": model["task"], "criterion": model["criterion"]})
    return {**state, "cfg": None, "args": args, "model": old}


@both_tasks
def test_published_checkpoints(roberta, kind):  # noqa: F811
    """They load into ours to be trained, and into the network without fairseq to be quantized."""
    run = roberta.run("stock", kind)
    path = roberta.checkpoint(published(state_of(run.path)))
    expected = logits(roberta.load(run.path, kind), kind)
    ours = roberta.model("--quant-noise-pq", 0.1, kind=kind).eval()
    ours.load_state_dict(state_of(path)["model"])
    assert torch.equal(logits(ours, kind), expected)
    torch.testing.assert_close(logits(Checkpoint(path).network, kind), expected, atol=1e-5, rtol=1e-5)
    out = roberta.new("packed.safetensors")
    verb("quantize", "--path", path, "--plan", roberta.plan(INT8), "--out", out)
    assert roberta.validate(out, kind)["loss"] == pytest.approx(run.valid[-1]["loss"], rel=0.02)


def quantized_heads(model):
    return [name for name in quantized_weights(model) if name.startswith("classification_heads")]


@pytest.mark.parametrize("name", ["scalar", "ipq"])
def test_heads_of_a_quantized_checkpoint(roberta, name):  # noqa: F811
    """They are taken over where --load-checkpoint-heads asks for it, and left out of a model without them."""
    path = roberta.run(name, SENTENCES).path
    taking = roberta.model("--load-checkpoint-heads", kind=MASKED)
    assert not taking.classification_heads
    taking.load_state_dict(state_of(path)["model"])
    assert quantized_heads(taking) == [f"classification_heads.{HEAD}.{part}" for part in ("dense", "out_proj")]
    assert torch.equal(logits(taking.eval(), SENTENCES), logits(roberta.load(path, SENTENCES), SENTENCES))
    without = roberta.model(kind=MASKED)
    without.load_state_dict(state_of(path)["model"])
    assert not without.classification_heads
    other = roberta.model("--num-classes", 5, kind=SENTENCES)
    before = other.classification_heads.state_dict()
    other.load_state_dict(state_of(path)["model"])
    after = other.classification_heads.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not quantized_heads(other)
