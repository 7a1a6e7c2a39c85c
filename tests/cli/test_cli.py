"""The verbs, and that every program reads what they write with the score that training reported."""

import json
import os

import fairseq
import pytest
import torch
from lm_fixture import (
    ATTENTION,
    FFN,
    PLANS,
    ROOT,
    USER_DIR,
    WORD_VECTORS,
    both_kinds,
    old_style,
    one_error,
    split,
    state_of,
)
from toys import python

from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.cli.main import main

TENSOR = {"name", "scheme", "shape", "block_size", "n_centroids", "bytes", "tied_to"}


def verb(*arguments):
    main(list(map(str, arguments)))


def printed_json(capsys):
    return json.loads(capsys.readouterr().out)


# Every verb, once.


def test_user_dir_prints_the_package(capsys):
    verb("user-dir")
    assert capsys.readouterr().out.strip() == USER_DIR


@both_kinds
def test_plan_of_a_checkpoint(lab, runs, kind, capsys):
    verb("plan", "--path", runs.stock(kind).path, "--plan", lab.plan(PLANS[kind]), "--json")
    table = printed_json(capsys)
    known = "parameters dense_bytes paper_bytes ratio original_bytes original_ratio latent_bytes tensors"
    assert set(table) == {*split(known)}
    assert table["original_bytes"] == table["dense_bytes"]
    assert all(set(row) == TENSOR for row in table["tensors"])
    assert table["ratio"] == table["dense_bytes"] / table["paper_bytes"]
    assert sum(row["bytes"] for row in table["tensors"]) == table["paper_bytes"]
    fc1 = next(row for row in table["tensors"] if row["name"] == "decoder.layers.0.fc1.weight")
    assert fc1 == {
        "name": "decoder.layers.0.fc1.weight",
        "scheme": "pq",
        "shape": [64, 32],
        "block_size": 8,
        "n_centroids": 16,
        "bytes": 256 * 4 / 8 + 16 * 8 * 2,
        "tied_to": None,
    }
    tied = {row["name"]: row["tied_to"] for row in table["tensors"] if row["tied_to"]}
    if kind == "plain":
        assert tied == {"decoder.output_projection.weight": "decoder.embed_tokens.weight"}
    else:
        assert len(tied) == 5
    parameters = {id(p): p.numel() for p in lab.model(kind=kind).parameters()}
    assert table["dense_bytes"] == 4 * sum(parameters.values())


def test_plan_of_an_architecture_in_a_process_of_its_own(lab):
    arguments = ["plan", "--arch", "quant_noise_transformer_lm_small", "--vocab-size", 110, "--json"]
    done = python("-m", "fairseq_quant_noise", *arguments, "--plan", ROOT / "configs/plans/small.yaml")
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    rows = {row["name"]: row for row in table["tensors"]}
    assert rows["decoder.embed_tokens.weight"]["shape"] == [110, 128]
    assert rows["decoder.output_projection.weight"]["tied_to"] == "decoder.embed_tokens.weight"
    assert rows["decoder.layers.3.fc2.weight"]["n_centroids"] == 256


def test_plan_without_json_is_a_table(lab, runs, capsys):
    verb("plan", "--path", runs.stock("plain").path, "--plan", lab.plan(PLANS["plain"]))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("decoder.layers.1.self_attn.out_proj.weight") and " 32x32 " in line for line in lines)
    assert "MiB" in lines[-1]


@both_kinds
def test_inspect_and_verify(runs, kind, capsys):
    path = runs.packed(kind)
    verb("inspect", path, "--json")
    info = printed_json(capsys)
    assert {"format_version", "file_bytes", "paper_bytes", "dense_bytes", "ratio", "tensors"} <= info.keys()
    assert info["format_version"] == 3
    assert info["file_bytes"] == os.path.getsize(path)
    assert all(row.keys() >= TENSOR for row in info["tensors"])
    parameters = [row for row in info["tensors"] if row["scheme"] == "pq" and row["tied_to"] is None]
    assert len(parameters) == (13 if kind == "plain" else 18)
    verb("inspect", path)
    assert "MiB on disk" in capsys.readouterr().out
    verb("verify", path)
    assert "whole" in capsys.readouterr().out


@pytest.mark.upstream(7)
@both_kinds
def test_the_file_holds_nothing_twice_and_nothing_that_evaluation_does_not_need(lab, runs, kind):
    packed = read(runs.packed(kind))
    assert not packed.manifest.ties.keys() & packed.tensors.keys()
    trained = state_of(runs.ipq(kind).path)
    assert sum(map(packed.tensor_bytes, packed.manifest.tensors)) < 60_000
    assert os.path.getsize(runs.packed(kind)) < os.path.getsize(runs.ipq(kind).path) / 2
    assert "optimizer" not in json.dumps(packed.manifest.model)
    assert str(lab.folder) not in json.dumps(packed.manifest.model)  # no path of the machine that trained it
    assert str(lab.folder) in json.dumps(trained["cfg"], default=str)


@pytest.fixture(scope="module")
def wide(lab):
    """A checkpoint of a model in which every weight feeds 256 centroids, and its plan; the embedding stays dense."""
    run = lab.train(*split("--decoder-embed-dim 64 --decoder-input-dim 64 --decoder-output-dim 64"), updates=1)
    plan = {"stages": [{**FFN, "n_centroids": 256, "block_size": 4}, {**ATTENTION, "n_centroids": 256}]}
    return run.path, lab.plan(plan)


@pytest.mark.upstream(7)
def test_the_file_is_as_small_as_the_paper_counts(lab, wide, capsys):
    path, plan = wide
    out = lab.new("wide.safetensors")
    verb("quantize", "--path", path, "--plan", plan, "--out", out)
    capsys.readouterr()
    verb("inspect", out, "--json")
    info = printed_json(capsys)
    header = 8 + int.from_bytes(out.read_bytes()[:8], "little")
    assert out.stat().st_size <= 1.01 * info["paper_bytes"] + header
    verb("plan", "--path", path, "--plan", plan, "--json")
    assert printed_json(capsys)["paper_bytes"] == pytest.approx(info["paper_bytes"], rel=0.01)


@both_kinds
def test_quantize_dense_quantize(lab, runs, kind, capsys):
    """What quantization gives, quantizes to itself."""
    plan = lab.plan(PLANS[kind])
    first, dense, second = lab.new("1.safetensors"), lab.new("dense.pt"), lab.new("2.safetensors")
    verb("quantize", "--path", runs.stock(kind).path, "--plan", plan, "--out", first)
    verb("to-dense", first, "--out", dense)
    verb("quantize", "--path", dense, "--plan", plan, "--out", second)
    assert "relative error 0.0000" in capsys.readouterr().err
    one, two = (lab.load(path).state_dict() for path in (dense, second))
    quantized = read(second).manifest.tensors
    assert len(quantized) == (13 if kind == "plain" else 18)
    for name, entry in quantized.items():
        decoded = two[f"{name}.centroids"][two[f"{name}.codes"].long()].view(entry.shape)
        assert torch.equal(decoded, one[name]), name
    assert lab.eval_lm(first) == pytest.approx(lab.eval_lm(second), rel=1e-6)


def test_the_same_quantization_gives_the_same_file(lab, runs):
    files = [lab.new("same.safetensors") for _ in range(2)]
    for file in files:
        verb("quantize", "--path", runs.stock("plain").path, "--plan", lab.plan(PLANS["plain"]), "--out", file)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.upstream(23)
def test_an_old_checkpoint_can_be_quantized_and_made_dense(lab, runs, capsys):
    stock = runs.stock("adaptive")
    old = lab.checkpoint(old_style(state_of(stock.path)))
    packed, dense = lab.new("old.safetensors"), lab.new("old-dense.pt")
    verb("quantize", "--path", old, "--plan", lab.plan(PLANS["adaptive"]), "--out", packed)
    assert lab.eval_lm(packed) < 200
    verb("to-dense", old, "--out", dense)
    assert lab.eval_lm(dense) == pytest.approx(stock.ppl, rel=1e-5)


def test_to_dense_of_a_checkpoint_with_noise_is_a_stock_checkpoint(lab, runs):
    run, out = runs.noised("plain"), lab.new("stock.pt")
    verb("to-dense", run.path, "--out", out)
    cfg = state_of(out)["cfg"]
    assert cfg["model"]["_name"] == "transformer_lm"
    assert cfg["model"]["quant_noise_pq"] == 0
    assert lab.eval_lm(out) == pytest.approx(run.ppl, rel=1e-5)
    go_on = lab.train("--finetune-from-model", out, arch="transformer_lm", updates=1)
    assert float(go_on.updates[0]["loss"]) < float(run.updates[0]["loss"]) - 0.5


# The score stays.


@pytest.mark.upstream(5)
@both_kinds
def test_eval_lm_gives_the_score_that_training_reported(lab, runs, kind):
    reported = runs.ipq(kind).ppl
    assert lab.eval_lm(runs.ipq(kind).path) == pytest.approx(reported, rel=1e-4)
    assert lab.eval_lm(runs.packed(kind)) == pytest.approx(reported, rel=1e-4)


STOCK_EVAL = """
import json, sys
import fairseq_cli.eval_lm as program
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
for arguments in json.loads(sys.argv[1]):
    args = options.parse_args_and_arch(options.get_eval_lm_parser(), arguments)
    print("PPL", float(program.main(convert_namespace_to_omegaconf(args))["perplexity"]))
assert not [name for name in sys.modules if name.startswith("fairseq_quant_noise")]
"""


@pytest.mark.upstream(5)
def test_stock_fairseq_gives_the_dense_checkpoint_the_same_score(lab, runs):
    arguments = [lab.eval_arguments(runs.dense(kind)) for kind in PLANS]
    done = python("-c", STOCK_EVAL, json.dumps(arguments), fresh=False)
    assert done.returncode == 0, done.stderr
    scores = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("PPL ")]
    assert scores == [pytest.approx(runs.ipq(kind).ppl, rel=1e-4) for kind in PLANS]


@pytest.mark.upstream(5)
@both_kinds
def test_fairseq_validate_gives_the_same_score(lab, runs, kind):
    reported = runs.ipq(kind).valid[-1]["loss"]
    straight = lab.new("straight.pt")
    verb("to-dense", runs.ipq(kind).path, "--out", straight)
    for path in (runs.ipq(kind).path, straight, runs.packed(kind), runs.dense(kind)):
        assert lab.validate(path)["loss"] == pytest.approx(reported, rel=1e-5)


def test_an_ipq_checkpoint_validates_without_its_teacher(lab, runs):
    """The teacher stays on the machine that trained."""
    state = state_of(runs.ipq("plain").path)
    state["cfg"]["criterion"]["ipq_teacher"] = "/nowhere/teacher.pt"
    moved = lab.checkpoint(state)
    assert lab.validate(moved)["loss"] == pytest.approx(runs.ipq("plain").valid[-1]["loss"], rel=1e-5)


def test_the_options_of_the_wrapped_criterion_come_along(lab, runs):
    options = ["--ipq-criterion", "label_smoothed_cross_entropy", "--ipq-criterion-options", '{"label_smoothing": 0.1}']
    plan = ["--quantization-config-path", lab.plan({"stages": [FFN]})]
    run = lab.train("--criterion", "ipq", *options, *plan, updates=1)
    packed, dense = lab.new("smooth.safetensors"), lab.new("smooth.pt")
    verb("export", "--path", run.path, "--out", packed)
    verb("to-dense", run.path, "--out", dense)
    for path in (packed, dense):
        assert lab.validate(path)["loss"] == pytest.approx(run.valid[-1]["loss"], rel=1e-5)


PLAIN_LOAD = """
import sys
class NoFairseq:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("fairseq", "fairseq_cli"):
            raise ImportError(name)
sys.meta_path.insert(0, NoFairseq)
import torch
from fairseq_quant_noise import load
out, tokens, *paths = sys.argv[1:]
with torch.no_grad():
    torch.save([load(path)(torch.load(tokens)) for path in paths], out)
assert "fairseq" not in sys.modules
"""


def test_load_gives_the_same_scores_where_fairseq_is_absent(lab, runs):
    tokens = torch.randint(4, 110, (3, 17), generator=torch.Generator().manual_seed(2))
    tokens[1, 11:] = 1
    given, out = lab.new("tokens.pt"), lab.new("scores.pt")
    torch.save(tokens, given)
    done = python("-c", PLAIN_LOAD, out, given, *map(runs.packed, PLANS))
    assert done.returncode == 0, done.stderr
    keep = tokens != 1
    for kind, scores in zip(PLANS, torch.load(out), strict=True):
        model = lab.load(runs.packed(kind))
        with torch.no_grad():
            expected = model.get_normalized_probs(model(tokens), log_probs=True)
        torch.testing.assert_close(scores.log_softmax(-1)[keep], expected[keep], rtol=0, atol=1e-6)


# Mistakes.

WRONG = {
    "plan: no checkpoint": ("plan --path /nowhere/a.pt --plan {plan}", 2, ["/nowhere/a.pt"]),
    "plan: no plan": ("plan --path {stock} --plan /nowhere/p.yaml", 2, ["/nowhere/p.yaml"]),
    "plan: a text for a checkpoint": ("plan --path {text} --plan {plan}", 3, ["{text}"]),
    "plan: a folder for a checkpoint": ("plan --path {folder} --plan {plan}", 2, ["{folder}"]),
    "plan: a packed file for a checkpoint": ("plan --path {packed} --plan {plan}", 2, ["{packed}"]),
    "plan: neither path nor arch": ("plan --plan {plan}", 2, ["--path", "--arch"]),
    "plan: no vocabulary": ("plan --arch quant_noise_transformer_lm --plan {plan}", 2, ["--vocab-size"]),
    "plan: no such architecture": ("plan --arch no_such --vocab-size 9 --plan {plan}", 2, ["no_such", "quant_noise_"]),
    "plan: not YAML": ("plan --path {stock} --plan {packed}", 2, ["{packed}"]),
    "plan: matches nothing": ("plan --path {stock} --plan {misses}", 2, ["nothing_like_this"]),
    "quantize: no checkpoint": ("quantize --path /nowhere/a.pt --plan {plan} --out {out}", 2, ["/nowhere/a.pt"]),
    "quantize: matches nothing": ("quantize --path {stock} --plan {misses} --out {out}", 2, ["nothing_like_this"]),
    "quantize: no stages": ("quantize --path {stock} --plan {empty} --out {out}", 2, ["stages"]),
    "quantize: no folder": (
        "quantize --path {stock} --plan {plan} --out /nowhere/f.safetensors",
        2,
        ["--out", "/nowhere"],
    ),
    "quantize: a folder for a file": ("quantize --path {stock} --plan {plan} --out {folder}", 2, ["{folder}"]),
    "quantize: quantized already": ("quantize --path {ipq} --plan {plan} --out {out}", 2, ["decoder."]),
    "export: dense": ("export --path {stock} --out {out}", 2, ["{stock}", "quantize"]),
    "export: no folder": ("export --path {ipq} --out /nowhere/f.safetensors", 2, ["--out", "/nowhere"]),
    "export: packed": ("export --path {packed} --out {out}", 2, ["{packed}"]),
    "inspect: no file": ("inspect /nowhere/f.safetensors", 2, ["/nowhere/f.safetensors"]),
    "inspect: damaged": ("inspect {damaged}", 3, ["{damaged}"]),
    "inspect: a text": ("inspect {text}", 3, ["{text}"]),
    "inspect: a checkpoint": ("inspect {stock}", 3, ["{stock}"]),
    "verify: damaged": ("verify {damaged}", 3, ["{damaged}"]),
    "verify: cut short": ("verify {short}", 3, ["{short}"]),
    "verify: no file": ("verify /nowhere/f.safetensors", 2, ["/nowhere/f.safetensors"]),
    "to-dense: damaged": ("to-dense {damaged} --out {out}", 3, ["{damaged}"]),
    "to-dense: a text": ("to-dense {text} --out {out}", 3, ["{text}"]),
    "to-dense: no folder": ("to-dense {packed} --out /nowhere/f.pt", 2, ["--out", "/nowhere"]),
}


@pytest.fixture(scope="module")
def files(lab, runs):
    """Paths for the command lines above."""
    packed = runs.packed("plain")
    content = packed.read_bytes()
    made = {name: lab.new(f"{name}.safetensors") for name in ("damaged", "short")}
    made["damaged"].write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    made["short"].write_bytes(content[: len(content) // 2])
    text, folder = lab.new("text.txt"), lab.new("folder")
    text.write_text("once upon a time\n")
    folder.mkdir()
    plans = {
        "plan": lab.plan({"stages": [WORD_VECTORS]}),
        "misses": lab.plan({"stages": [{"match": "nothing_like_this"}]}),
        "empty": lab.plan({"stages": []}),
    }
    checkpoints = {"stock": runs.stock("plain").path, "ipq": runs.ipq("plain").path}
    return {**made, **plans, **checkpoints, "packed": packed, "text": text, "folder": folder}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line_and_leaves_nothing(lab, files, case, capsys):
    line, code, names = WRONG[case]
    place = lab.new("empty")
    place.mkdir()
    values = {**files, "out": place / "out.safetensors"}
    with pytest.raises(SystemExit) as end:
        main(line.format(**values).split())
    assert end.value.code == code
    said = capsys.readouterr().err.splitlines()
    (message,) = [text for text in said if text.startswith("error: ")]
    assert message == said[-1]
    assert not [text for text in said if "Traceback" in text]
    assert all(name.format(**values) in message for name in names), message
    assert not list(place.iterdir())
    assert not list(files["folder"].iterdir())


@pytest.mark.parametrize("name", ["quantize", "export", "to-dense"])
def test_a_mistake_leaves_the_file_that_was_there(lab, files, name):
    out = lab.new("before.safetensors")
    out.write_text("what was there")
    lines = {
        "quantize": f"quantize --path {files['stock']} --plan {files['misses']} --out {out}",
        "export": f"export --path {files['stock']} --out {out}",
        "to-dense": f"to-dense {files['damaged']} --out {out}",
    }
    with pytest.raises(SystemExit):
        main(lines[name].split())
    assert out.read_text() == "what was there"


@pytest.mark.parametrize("program", ["eval_lm", "validate"])
def test_fairseqs_programs_refuse_a_damaged_file_with_code_3(lab, files, program, capsys):
    with pytest.raises(SystemExit) as end:
        getattr(lab, program)(files["damaged"])
    assert end.value.code == 3
    assert str(files["damaged"]) in one_error(capsys.readouterr())


def test_fairseq_is_the_version_these_tests_know():
    assert fairseq.__version__.startswith("0.12")
