"""Translation through the verbs: every program makes the same translations of what they write."""

import json

import pytest
import torch
import yaml
from lm_fixture import fairseqs_own_noise, state_of
from toys import python
from translation_fixture import (
    IPQ,
    OWN,
    PLAN,
    SHARED,
    SOURCE_WORDS,
    WEIGHTS,
    WORDS,
    as_of_2018,
    both_kinds,
    pairs,
    translation,  # noqa: F401
    verb,
)

import fairseq_quant_noise
from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.checkpoints.checkpoint import Checkpoint
from fairseq_quant_noise.errors import UserError
from fairseq_quant_noise.plugin.models.transformer import QuantNoiseTransformer
from fairseq_quant_noise.structure.modules import find_stacks, shared_chunk

INT8 = {"stages": [{"match": ".*", "scheme": "int8"}]}


@torch.no_grad()
def logits(network):
    """Of our network without fairseq, or of fairseq's, on one batch, without those of padding."""
    sample = pairs()
    inputs = sample["net_input"]
    if hasattr(network, "get_normalized_probs"):
        scores = network(**inputs)[0]
    else:
        scores = network(inputs["src_tokens"], inputs["prev_output_tokens"])
    return scores[inputs["prev_output_tokens"] != 1]


def check_same(one, other):
    torch.testing.assert_close(logits(one), logits(other), atol=1e-5, rtol=1e-5)


@both_kinds
def test_a_packed_file_translates_as_its_checkpoint_does(translation, kind):  # noqa: F811
    run, packed, dense = translation.run("ipq", kind), translation.packed(kind), translation.new("dense.pt")
    bleu, lines = translation.translate(run.path, kind=kind)
    assert len(lines) == 2 * 24  # hypotheses and their words' scores
    assert translation.translate(packed, kind=kind) == (bleu, lines)
    check_same(translation.load(packed, kind), translation.load(run.path, kind))
    check_same(fairseq_quant_noise.load(packed), translation.load(run.path, kind))
    verb("to-dense", packed, "--out", dense)
    stock = translation.load(dense, kind)
    assert type(stock).__module__.startswith("fairseq.models.transformer")
    check_same(stock, translation.load(run.path, kind))


def test_the_dense_checkpoint_needs_no_plugin(translation):  # noqa: F811
    dense = translation.new("dense.pt")
    verb("to-dense", translation.packed(SHARED), "--out", dense)
    _, lines = translation.translate(dense)
    arguments = translation.generate_arguments(dense)
    stock = f"import sys; sys.argv[1:] = {arguments}; from fairseq_cli.generate import cli_main; cli_main()"
    done = python("-W", "ignore", "-c", f"{stock}; assert 'fairseq_quant_noise' not in sys.modules")
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(line for line in done.stdout.splitlines() if line.startswith(("H-", "P-"))) == lines


def test_a_packed_and_a_dense_model_make_an_ensemble(translation):  # noqa: F811
    packed, stock = translation.packed(SHARED), translation.run("stock", SHARED).path
    together, *alone = (translation.translate(*paths)[1] for paths in ([packed, stock], [packed], [stock]))
    assert len(together) == len(alone[0])
    assert together not in alone


def test_three_lines_of_python_translate(translation):  # noqa: F811
    packed, staged = translation.packed(SHARED), translation.run("ipq", SHARED).path
    said = []
    for path in (packed, staged):
        hub = QuantNoiseTransformer.from_pretrained(str(path.parent), path.name, str(translation.folder / SHARED))
        said.append(hub.translate("w1 w2 w3", beam=2))
    assert said[0]
    assert said[0] == said[1]


@both_kinds
def test_the_file_has_each_weight_once_and_says_its_size(translation, kind):  # noqa: F811
    packed = read(translation.packed(kind))
    config = packed.manifest.model
    assert (config["vocab_size"], config["cfg"]["model"]["source_vocab_size"]) == (WORDS, SOURCE_WORDS[kind])
    assert config["cfg"]["criterion"]["_name"] == "label_smoothed_cross_entropy"
    words = {"decoder.embed_tokens.weight", "decoder.output_projection.weight"}
    assert packed.manifest.ties == (dict.fromkeys(words, "encoder.embed_tokens.weight") if kind == SHARED else {})
    told = json.loads(verb("inspect", translation.packed(kind), "--json"))
    plan = ["--path", translation.run("stock", kind).path, "--plan", translation.plan(PLAN), "--json"]
    planned = json.loads(verb("plan", *plan))
    versions = 2 * 4  # bytes of two buffers that are no parameters
    assert told["paper_bytes"] == planned["paper_bytes"] + versions
    assert told["dense_bytes"] == planned["dense_bytes"] + versions
    assert planned["parameters"] == sum(p.numel() for p in translation.run("stock", kind).model.parameters())


@both_kinds
def test_one_shot_quantization_of_a_stock_checkpoint(translation, kind):  # noqa: F811
    stock, out = translation.run("stock", kind).path, translation.new("one-shot.safetensors")
    verb("quantize", "--path", stock, "--plan", translation.plan(PLAN), "--out", out)
    check_same(fairseq_quant_noise.load(out), translation.load(out, kind))
    assert set(read(out).manifest.tensors) == {f"{name}.weight" for name in WEIGHTS[kind]}


@pytest.mark.upstream(23)
def test_a_checkpoint_as_of_2018_is_quantized_and_teaches(translation):  # noqa: F811
    """A Namespace instead of a configuration, fused projections, numbered norms, no weight for the output."""
    stock, plan = translation.run("stock", SHARED).path, translation.plan(PLAN)
    files = [translation.new(f"{age}.safetensors") for age in ("old", "new")]
    state = {**state_of(stock), "last_optimizer_state": None}  # whose order was another one
    stock = translation.checkpoint(state)
    aged = translation.checkpoint(
        {**state, "cfg": None, "args": state["cfg"]["model"], "model": as_of_2018(state["model"])}
    )
    for path, file in zip((aged, stock), files, strict=True):
        verb("quantize", "--path", path, "--plan", plan, "--out", file)
    assert translation.translate(files[0]) == translation.translate(files[1])
    run = translation.train("--finetune-from-model", aged, *IPQ, "--ipq-teacher", aged, updates=1)
    assert run.updates[0]["loss"] < translation.run("stock", SHARED).updates[0]["loss"] - 0.5


def test_activations_in_int8_are_calibrated_on_pairs(translation):  # noqa: F811
    stock, out = translation.run("stock", SHARED).path, translation.new("int8.safetensors")
    plan = translation.plan({**INT8, "activations": {"calibration_batches": 2}})
    data = translation.folder / SHARED
    verb("quantize", "--path", stock, "--plan", plan, "--calibration-data", data, "--out", out)
    assert set(read(out).manifest.inputs) > {
        "encoder.layers.0.fc1",
        "decoder.layers.1.fc2",
        "decoder.output_projection",
    }
    bleu, _ = translation.translate(out)
    assert bleu == pytest.approx(translation.translate(stock)[0], abs=1.0)


def test_layers_are_kept_on_either_side(translation):  # noqa: F811
    stock, out, packed = (translation.run("stock", SHARED).path, *map(translation.new, ("p.pt", "p.safetensors")))
    said = verb("prune", "--path", stock, "--keep", "encoder=0,1", "--keep", "decoder=1", "--out", out)
    assert "2 layers in encoder, 1 layers in decoder" in said
    name = "decoder.layers.{}.encoder_attn.k_proj.weight"
    kept, whole = (state_of(path)["model"][name.format(i)] for path, i in ((out, 0), (stock, 1)))
    assert torch.equal(kept, whole)
    verb("quantize", "--path", out, "--plan", translation.plan(INT8), "--out", packed)
    sizes = {name: len(stack) for name, stack in find_stacks(fairseq_quant_noise.load(packed)).items()}
    assert sizes == {"encoder.layers": 2, "decoder.layers": 1}
    run = translation.train("--finetune-from-model", out, "--decoder-layers", 1, updates=1)
    check_same(Checkpoint(run.path).network, translation.load(run.path))
    ours, pruned = translation.train("--finetune-from-model", stock, updates=1).path, translation.new("ours.pt")
    verb("prune", "--path", ours, "--keep", "encoder=0,1", "--keep", "decoder=1", "--out", pruned)
    override = "{'decoder_layers_to_keep': '1'}"  # fairseq's own way
    assert translation.translate(ours, model_overrides=override) == translation.translate(pruned)


PRUNED = ["transformer", "bart_base", "quant_noise_transformer"]


@pytest.fixture(scope="module")
def three_layers(translation):  # noqa: F811
    """Checkpoints of three layers a side, by architecture: fairseq's own, and this package's."""
    narrow = ["--decoder-embed-dim", 32, "--decoder-ffn-embed-dim", 64]
    flags = ["--encoder-layers", 3, "--decoder-layers", 3, *narrow]
    return {arch: translation.train(*flags, arch=arch, updates=3).path for arch in PRUNED}


@pytest.mark.upstream(30)
@pytest.mark.upstream(31)
@pytest.mark.parametrize("arch", PRUNED)
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_an_override_for_one_side_leaves_the_other_one_whole(translation, three_layers, arch, side):  # noqa: F811
    path, pruned = three_layers[arch], translation.new("pruned.pt")
    verb("prune", "--path", path, "--keep", f"{side}=0,2", "--out", pruned)
    option = f"{side}_layers_to_keep"
    lines = translation.translate(path, model_overrides=f"{{'{option}': '0,2'}}")
    assert lines == translation.translate(pruned)
    assert lines != translation.translate(path)
    overrides = {"data_name_or_path": str(translation.folder / SHARED), option: "0,2"}
    (model,) = QuantNoiseTransformer.from_pretrained(str(path.parent), path.name, **overrides).models
    sizes = {name: len(stack) for name, stack in find_stacks(model).items()}
    assert sizes == {"encoder.layers": 3, "decoder.layers": 3} | {f"{side}.layers": 2}
    with pytest.raises(UserError, match=f"--{side}-layers-to-keep names layer 3, and .*{side}.* has 3 layers"):
        QuantNoiseTransformer.from_pretrained(str(path.parent), path.name, **overrides | {option: "0,3"})


@pytest.mark.upstream(22)
def test_layers_to_keep_are_read_from_the_command_line(translation):  # noqa: F811
    """Of fairseq's own model they are a list there, which it then takes for text."""
    model = translation.task().build_model(translation.config("--decoder-layers-to-keep", "0").model)
    assert {name: len(stack) for name, stack in find_stacks(model).items()} == {
        "encoder.layers": 2,
        "decoder.layers": 1,
    }


def test_shared_layers_on_both_sides_from_training_to_the_file(translation):  # noqa: F811
    stock, shared, file = (
        translation.run("stock", OWN).path,
        translation.new("shared.pt"),
        translation.new("f.safetensors"),
    )
    verb("share", "--path", stock, "--share-layers", 2, "--share-from", "mean", "--out", shared)
    flags = [
        "--finetune-from-model",
        shared,
        "--share-layers",
        2,
        "--encoder-layerdrop",
        0.2,
        "--decoder-layerdrop",
        0.2,
    ]
    plan = translation.plan(PLAN)
    run = translation.train(*flags, "--quant-noise-pq", 0.1, "--quantization-config-path", plan, kind=OWN, updates=4)
    verb("export", "--path", run.path, "--out", file)
    assert read(file).manifest.layers == {"encoder.layers": [0, 0], "decoder.layers": [0, 0]}
    network = fairseq_quant_noise.load(file)
    assert {shared_chunk(stack) for stack in find_stacks(network).values()} == {2}
    check_same(network, translation.load(run.path, OWN))
    assert translation.translate(file, kind=OWN) == translation.translate(run.path, kind=OWN)


def test_a_stock_checkpoint_goes_on_here_and_back(translation):  # noqa: F811
    stock = translation.run("stock", SHARED)
    run = translation.train("--restore-file", stock.path, "--quant-noise-pq", 0.1, updates=62)
    assert [log["num_updates"] for log in run.updates] == [61, 62]
    assert run.updates[0]["loss"] < stock.updates[0]["loss"] - 0.5
    dense = translation.new("dense.pt")
    verb("to-dense", run.path, "--out", dense)
    assert state_of(dense)["cfg"]["model"]["_name"] == "transformer"
    check_same(translation.load(dense), translation.load(run.path))


def test_the_layers_after_the_embeddings_of_fairseqs_own_noise_are_kept(translation):  # noqa: F811
    """Stock fairseq adds one to each side."""
    with fairseqs_own_noise():
        stock = translation.train("--quant-noise-pq", 0.1, arch="transformer", updates=1)
    run = translation.train("--restore-file", stock.path, "--quant-noise-embedding-layer", updates=2)
    names = {"encoder.quant_noise.weight", "decoder.quant_noise.weight"}
    assert names <= state_of(run.path)["model"].keys()
    check_same(Checkpoint(run.path).network, translation.load(run.path))
    with pytest.raises(SystemExit):
        translation.train("--restore-file", stock.path, updates=2)


def test_the_shipped_plan_names_every_matrix(translation):  # noqa: F811
    from lm_fixture import ROOT

    for kind in (SHARED, OWN):
        arguments = ["--path", translation.run("stock", kind).path, "--plan", ROOT / "configs/plans/translation.yaml"]
        table = json.loads(verb("plan", *arguments, "--json"))
        dense = [row["name"] for row in table["tensors"] if row["scheme"] == "dense" and len(row["shape"]) > 1]
        assert dense == []
    assert len(yaml.safe_load((ROOT / "configs/plans/translation.yaml").read_text())["stages"]) == 3


def test_plan_for_an_architecture(translation):  # noqa: F811
    arguments = ["--arch", "quant_noise_transformer_iwslt_de_en", "--set", "share_all_embeddings=true"]
    plan = ["--plan", translation.plan(PLAN), "--vocab-size", 10_000, "--json"]
    table = json.loads(verb("plan", *arguments, *plan))
    assert table["parameters"] == 36_663_296  # 10,000 x 512 once, 6 layers of 2.1 M and 6 of 3.2 M
