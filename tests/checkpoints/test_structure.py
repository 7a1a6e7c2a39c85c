"""`prune` and `share`: what fairseq does with the checkpoints that they write."""

import json
import re
import shutil

import pytest
import torch
from fairseq.models.transformer_lm import TransformerLanguageModel
from lm_fixture import ATTENTION, FFN, PLANS, WORD_VECTORS, batch, both_kinds, one_error, same, state_of

from fairseq_quant_noise import load
from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.structure.state import stack_sizes

DEEP = ["--decoder-layers", 4, "--decoder-layerdrop", 0.2]
PACKED_PLAN = {"stages": [FFN, WORD_VECTORS, ATTENTION]}


@pytest.fixture(scope="session")
def deep(lab):
    """Stock fairseq's own, four layers, trained with LayerDrop."""
    return lab.train(*DEEP, arch="transformer_lm")


def ran(capsys, *arguments):
    """What a verb prints."""
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def refused(capsys, *arguments):
    """The error of a verb."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    return one_error(capsys.readouterr())


def pruned(lab, capsys, path, keep="every-other"):
    out = lab.new("pruned.pt")
    ran(capsys, "prune", "--path", path, "--keep", keep, "--out", out)
    return out


def shared(lab, capsys, path, start="first"):
    out = lab.new("shared.pt")
    ran(capsys, "share", "--path", path, "--share-layers", 2, "--share-from", start, "--out", out)
    return out


def test_a_pruned_checkpoint_is_a_checkpoint_of_fewer_layers(lab, deep, capsys):
    out = pruned(lab, capsys, deep.path, "1,3")
    before, after = state_of(deep.path)["model"], state_of(out)["model"]
    assert stack_sizes(after) == {"decoder.layers": 2}
    assert torch.equal(after["decoder.layers.0.fc1.weight"], before["decoder.layers.1.fc1.weight"])
    assert torch.equal(after["decoder.layers.1.fc1.weight"], before["decoder.layers.3.fc1.weight"])
    assert state_of(out)["cfg"]["model"]["decoder_layers"] == 2


def test_fairseqs_flag_and_the_verb_prune_alike(lab, deep, capsys):
    """In training's validation, with --model-overrides, and from the verb."""
    out = pruned(lab, capsys, deep.path, "0,2")
    flags = ["--finetune-from-model", deep.path, "--decoder-layers-to-keep", "0,2", "--lr", 0]
    run = lab.train("--decoder-layers", 4, *flags, updates=1)
    assert lab.eval_lm(run.path) == pytest.approx(lab.eval_lm(out), rel=1e-6)
    assert stack_sizes(state_of(run.path)["model"]) == {"decoder.layers": 2}


@pytest.mark.parametrize("packed", [False, True], ids=["checkpoint", "packed file"])
def test_model_overrides_prune_what_is_evaluated(lab, deep, capsys, packed):
    path = lab.train("--decoder-layers", 4, "--finetune-from-model", deep.path, updates=1).path
    out = pruned(lab, capsys, path, "0,2")
    if packed:
        paths = path, out
        path, out = lab.new("whole.safetensors"), lab.new("pruned.safetensors")
        for source, file in zip(paths, (path, out), strict=True):
            ran(capsys, "quantize", "--path", source, "--plan", lab.plan(PACKED_PLAN), "--out", file)
    pruned_ppl = lab.eval_lm(out)
    assert lab.eval_lm(path, model_overrides="{'decoder_layers_to_keep': '0,2'}") == pytest.approx(pruned_ppl, rel=1e-6)
    for keep, message in (("0,4", "names layer 4"), ("", "is ; give the numbers")):
        with pytest.raises(SystemExit):
            lab.eval_lm(path, model_overrides=f"{{'decoder_layers_to_keep': '{keep}'}}")
        assert f"--decoder-layers-to-keep {message}" in one_error(capsys.readouterr())


def test_a_packed_file_is_not_pruned(lab, runs, capsys):
    line = ["prune", "--path", runs.packed("plain"), "--keep", "0", "--out", lab.new()]
    assert "is a packed file; prune or share the checkpoint that it was made of" in refused(capsys, *line)


def test_a_pruned_checkpoint_goes_on_training_and_quantizes(lab, deep, capsys):
    out = pruned(lab, capsys, deep.path)
    run = lab.train("--restore-file", out, "--decoder-layers", 2)
    assert run.updates[-1]["num_updates"] == 6
    plan, file = lab.plan(PACKED_PLAN), lab.new("pruned.safetensors")
    ran(capsys, "quantize", "--path", run.path, "--plan", plan, "--out", file)
    assert lab.eval_lm(file) > 1
    assert len(load(file).decoder.layers) == 2


@pytest.mark.upstream(22)
@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("0,4", "names layer 4, and .* 4 layers; give numbers from 0 to 3"),
        ("1,1", "names layer 1 twice"),
        ("", "is ; give the numbers of the layers|is empty"),
        ("a", "is a; give the numbers of the layers to keep"),
    ],
)
def test_lists_that_cannot_be_kept_are_refused_by_name(lab, deep, capsys, keep, message):
    out = lab.new("never.pt")
    assert re.search(message, refused(capsys, "prune", "--path", deep.path, "--keep", keep, "--out", out))
    assert not out.exists()
    if keep:
        with pytest.raises(SystemExit):
            lab.train("--decoder-layers", 4, "--finetune-from-model", deep.path, "--decoder-layers-to-keep", keep)
        assert re.search("--decoder-layers-to-keep " + message, one_error(capsys.readouterr()))


@pytest.mark.upstream(30)
@pytest.mark.parametrize("how", ["the verb", "training", "an override"])
def test_from_pretrained_loads_kept_layers_that_are_no_neighbours(lab, deep, capsys, how):
    path, overrides = deep.path, {}
    if how == "the verb":
        path = pruned(lab, capsys, deep.path, "0,3")
    elif how == "training":
        flags = ["--finetune-from-model", deep.path, "--decoder-layers-to-keep", "0,3", "--lr", 0]
        path = lab.train("--decoder-layers", 4, *flags, updates=1).path
    else:
        overrides = {"decoder_layers_to_keep": "0,3"}
    hub = TransformerLanguageModel.from_pretrained(
        str(path.parent), path.name, data_name_or_path=str(lab.data), **overrides
    )
    (model,), whole = hub.models, state_of(deep.path)["model"]
    for layer, stored in zip(model.decoder.layers, (0, 3), strict=True):
        assert torch.equal(layer.fc1.weight, whole[f"decoder.layers.{stored}.fc1.weight"])


@pytest.mark.upstream(22)
def test_a_run_that_prunes_resumes(lab, deep):
    """Stock fairseq prunes the pruned checkpoint once more, and misses layers."""
    flags = ["--decoder-layers", 4, "--decoder-layers-to-keep", "1,3", "--finetune-from-model", deep.path]
    whole = lab.train(*flags, updates=6)
    half = lab.train(*flags, updates=3)
    resumed = lab.train(*flags, updates=6, save=half.folder)
    assert same(state_of(resumed.path)["model"], state_of(whole.path)["model"])
    assert resumed.updates[0]["num_updates"] == 4


@pytest.mark.upstream(22)
def test_the_layers_of_the_other_side_stay(lab, capsys):
    """Stock fairseq loses the decoder's layers where only the encoder's are pruned."""
    names = [f"{side}.layers.{i}.fc1.weight" for side in ("encoder", "decoder") for i in range(3)]
    layers = {name: torch.zeros(2, 2) for name in names}
    state = {"model": layers, "cfg": {"model": {"_name": "transformer", "encoder_layers": 3, "decoder_layers": 3}}}
    path, out = lab.checkpoint(state), lab.new("pruned.pt")
    ran(capsys, "prune", "--path", path, "--keep", "encoder=2", "--out", out)
    found = state_of(out)
    assert stack_sizes(found["model"]) == {"encoder.layers": 1, "decoder.layers": 3}
    assert found["cfg"]["model"]["encoder_layers"] == 1
    assert found["cfg"]["model"]["decoder_layers"] == 3
    ran(capsys, "prune", "--path", path, "--keep", "encoder=every-other", "--keep", "decoder=0", "--out", out)
    assert stack_sizes(state_of(out)["model"]) == {"encoder.layers": 2, "decoder.layers": 1}
    assert "give one list, or one for each stack" in refused(
        capsys, *("prune", "--path", path, "--keep", "0", "--keep", "decoder=0", "--out", out)
    )


def test_sharing_from_scratch_stores_evaluates_and_resumes_as_one(lab):
    flags = ["--decoder-layers", 4, "--decoder-layerdrop", 0.2, "--share-layers", 2, "--quant-noise-pq", 0.1]
    run = lab.train(*flags)
    layers = run.model.decoder.layers
    assert layers[1].self_attn.q_proj.weight is layers[0].self_attn.q_proj.weight
    assert (layers.chunk, layers.p) == (2, 0.2)
    state = state_of(run.path)
    assert len(state["last_optimizer_state"]["state"]) == len(list(run.model.parameters()))
    assert stack_sizes(state["model"]) == {"decoder.layers": 4}, "under stock names"
    half = lab.train(*flags, updates=3)
    resumed = lab.train(*flags, save=half.folder)
    assert same(state_of(resumed.path)["model"], state["model"])
    assert same(state_of(resumed.path)["last_optimizer_state"], state["last_optimizer_state"])
    assert lab.eval_lm(run.path) == pytest.approx(run.ppl, rel=1e-5)


def test_each_use_of_a_shared_layer_remembers_its_own_keys(lab):
    """As fairseq-generate decodes: a token at a time, with the keys of the tokens before in every layer."""
    model = lab.model("--decoder-layers", 4, "--share-layers", 2).eval()
    tokens = batch()["net_input"]["src_tokens"][:1]
    whole, _ = model(tokens)
    memory: dict = {}
    for i in range(tokens.shape[1]):
        step, _ = model.decoder(tokens[:, : i + 1], incremental_state=memory)
        torch.testing.assert_close(step[:, -1], whole[:, i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["first", "mean"])
def test_the_verb_shares_as_the_flag_does(lab, deep, capsys, start):
    path = shared(lab, capsys, deep.path, start)
    model = state_of(path)["model"]
    assert torch.equal(model["decoder.layers.1.fc1.weight"], model["decoder.layers.0.fc1.weight"])
    flags = ["--decoder-layers", 4, "--share-layers", 2, "--share-from", start, "--lr", 0]
    run = lab.train(*flags, "--finetune-from-model", deep.path, updates=1)
    assert lab.eval_lm(run.path) == pytest.approx(lab.eval_lm(path), rel=1e-6)
    again = lab.train("--decoder-layers", 4, "--share-layers", 2, "--restore-file", path)
    assert again.updates[-1]["num_updates"] == 6


def test_mistakes_in_sharing_are_one_line(lab, deep, capsys):
    out = lab.new("never.pt")
    line = ["share", "--path", deep.path, "--out", out]
    assert "chunks of 3 layers do not divide its 4 layers" in refused(capsys, *line, "--share-layers", 3)
    assert "--share-layers is 1; give how many adjacent layers share, 2 or more" in refused(
        capsys, *line, "--share-layers", 1
    )
    assert not out.exists()
    with pytest.raises(SystemExit):
        lab.train("--decoder-layers", 4, "--share-layers", 3)
    assert "decoder.layers: chunks of 3 layers do not divide its 4 layers" in one_error(capsys.readouterr())


def test_a_checkpoint_in_codes_cannot_be_shared(lab, runs, capsys):
    message = refused(capsys, "share", "--path", runs.ipq("plain").path, "--share-layers", 2, "--out", lab.new())
    assert "is quantized; share the layers of the dense checkpoint" in message


def test_a_checkpoint_in_stages_is_pruned_with_its_codes(lab, runs, capsys):
    out, file = pruned(lab, capsys, runs.ipq("plain").path, "1"), lab.new("pruned.safetensors")
    ran(capsys, "export", "--path", out, "--out", file)
    assert lab.eval_lm(file) == pytest.approx(lab.eval_lm(out), rel=1e-6)
    assert len(load(file).decoder.layers) == 1
    assert read(file).manifest.plan["stages"]


@pytest.mark.usefixtures("fp32_products")
@both_kinds
def test_everything_together_in_one_plan(lab, deep, capsys, kind):
    """Noise, sharing, LayerDrop, pruning, iPQ with int8 centroids: training, the file and stock fairseq agree."""
    start = deep.path if kind == "plain" else lab.train(*DEEP, arch="transformer_lm", kind=kind).path
    stages = [{**stage, "updates": 2} for stage in PLANS[kind]["stages"]]
    plan = {
        "structure": {"share_layers": 2, "share_from": "mean", "keep_layers": "every-other", "layerdrop": 0.2},
        "noise": [{"match": ".*", "p": 0.1, "block_size": 4}],
        "stages": stages,
        "centroids": {"dtype": "int8"},
    }
    criterion = ["--criterion", "ipq", "--ipq-criterion", "cross_entropy" if kind == "plain" else "adaptive_loss"]
    flags = [*DEEP, "--finetune-from-model", start, "--quantization-config-path", lab.plan(plan), *criterion]
    run, half = lab.train(*flags, "--save-interval-updates", 4, kind=kind, updates=7), lab.new()
    half.mkdir()
    shutil.copy(run.folder / "checkpoint_1_4.pt", half / "checkpoint_last.pt")
    resumed = lab.train(*flags, kind=kind, updates=7, save=half)
    assert same(state_of(resumed.path)["model"], state_of(run.path)["model"])
    file, dense = lab.new("all.safetensors"), lab.new("dense.pt")
    ran(capsys, "export", "--path", run.path, "--out", file)
    ran(capsys, "to-dense", file, "--out", dense)
    assert read(file).manifest.layers == {"decoder.layers": [0, 0]}
    for path in (run.path, file, dense):
        assert lab.eval_lm(path) == pytest.approx(run.ppl, rel=1e-4)
    assert state_of(dense)["cfg"]["model"]["_name"] == "transformer_lm"
    assert "share_layers" not in state_of(dense)["cfg"]["model"]
    layers = load(file).decoder.layers
    assert layers[1].fc1._modules["weight"] is layers[0].fc1._modules["weight"]
    assert json.loads(ran(capsys, "inspect", file, "--json"))["plan"]["structure"]["keep_layers"] == "every-other"


def test_one_shot_and_the_dry_run_follow_the_structure(lab, deep, capsys):
    plan = lab.plan({**PACKED_PLAN, "structure": {"share_layers": 2, "keep_layers": [2, 3]}})
    info = json.loads(ran(capsys, "plan", "--path", deep.path, "--plan", plan, "--json"))
    file = lab.new("one-shot.safetensors")
    ran(capsys, "quantize", "--path", deep.path, "--plan", plan, "--out", file)
    found = json.loads(ran(capsys, "inspect", file, "--json"))
    for key in ("paper_bytes", "dense_bytes"):
        assert found[key] == pytest.approx(info[key], abs=8), "but for fairseq's number of its version"
    assert info["original_bytes"] > info["dense_bytes"]
    assert info["original_ratio"] == pytest.approx(info["original_bytes"] / info["paper_bytes"])
    steps = shared(lab, capsys, deep.path)
    by_hand, other = pruned(lab, capsys, steps, "2,3"), lab.new("by-hand.safetensors")
    ran(capsys, "quantize", "--path", by_hand, "--plan", lab.plan(PACKED_PLAN), "--out", other)
    assert lab.eval_lm(other) == lab.eval_lm(file)
    assert "keeps layer 0 of decoder.layers and not layer 1" in refused(
        capsys, *("prune", "--path", steps, "--keep", "0,2", "--out", lab.new())
    )


@pytest.mark.parametrize(
    ("flags", "structure", "message"),
    [
        (["--share-layers", 2], {"share_layers": 4}, "--share-layers 2 and the plan's share_layers 4 differ; give one"),
        (["--decoder-layers-to-keep", "0,1"], {"keep_layers": [0]}, "and the plan's keep_layers both prune; give one"),
        ([], {"share_layers": 3}, "decoder.layers: chunks of 3 layers do not divide its 4 layers"),
        ([], {"share_layers": 2, "keep_layers": [1]}, "keeps layer 1 of decoder.layers and not layer 0"),
        ([], {"keep_layers": [7]}, "keep_layers names layer 7, and decoder.layers has 4 layers"),
        ([], {"keep_layers": {"encoder": [0]}}, "names the stack 'encoder'; there are: decoder.layers"),
        ([], {"layerdrop": 1}, "layerdrop is 1, which leaves out every layer"),
    ],
)
def test_nonsense_is_refused_before_any_work(lab, capsys, flags, structure, message):
    plan = lab.plan({**PACKED_PLAN, "structure": structure})
    with pytest.raises(SystemExit) as caught:
        lab.train("--decoder-layers", 4, *flags, "--quantization-config-path", plan)
    assert caught.value.code == 2
    assert message in one_error(capsys.readouterr())
