"""`plan --budget`: the plan for a size, as the file that `quantize` then writes."""

import copy
import functools
import itertools
import json
import re

import pytest
import torch
import yaml
from lm_fixture import PLANS, one_error
from torch import nn

from fairseq_quant_noise import quantize_, save
from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.checkpoints.checkpoint import Checkpoint
from fairseq_quant_noise.checkpoints.safe_load import safe_load
from fairseq_quant_noise.cli import budget, planning
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.quantization.budget import options
from fairseq_quant_noise.quantization.budget.uniform import UNIFORM

BUDGET = 40_000  # bytes; the networks have 85,000 and more dense


@pytest.fixture(autouse=True)
def few_ways(monkeypatch):
    """Time is in the number of ways to store a weight."""
    monkeypatch.setattr(options, "BLOCK_SIZES", (4, 8))
    monkeypatch.setattr(options, "CENTROIDS", (16, 64))


def verb(*arguments):
    main(list(map(str, arguments)))


def planned(capsys, *arguments):
    verb("plan", *arguments, "--json")
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["plain", "adaptive"])
def test_quantize_by_the_plan_writes_the_file_that_was_promised(lab, runs, kind, capsys):
    path, plan, out = runs.stock(kind).path, lab.new("plan.yaml"), lab.new("packed.safetensors")
    found = planned(capsys, "--path", path, "--budget", BUDGET, "--out", plan)
    verb("quantize", "--path", path, "--plan", plan, "--out", out)
    assert found["file_bytes"] == out.stat().st_size
    assert 0.9 * BUDGET < found["file_bytes"] <= BUDGET
    assert found["losses"] is None
    entries = read(out).manifest.tensors
    chosen = {t["name"]: t for t in found["tensors"] if t["scheme"] != "dense" and t["tied_to"] is None}
    assert {name: (e.scheme, e.block_size, e.n_centroids) for name, e in entries.items()} == {
        name: (t["scheme"], t["block_size"], t["n_centroids"]) for name, t in chosen.items()
    }


def test_data_say_the_loss_before_and_after(lab, runs, capsys):
    """A network of 32 numbers a word can lose little to more bytes."""
    path = runs.stock("plain").path
    small, large = (
        planned(capsys, "--path", path, "--budget", size, "--calibration-data", lab.data)["losses"]
        for size in (30_000, 60_000)
    )
    assert small[0] == large[0]
    assert small[1] - small[0] > abs(large[1] - large[0])


def test_the_table_ends_with_the_size_and_the_plan_begins_with_it(lab, runs, capsys):
    plan = lab.new("plan.yaml")
    verb("plan", "--path", runs.stock("plain").path, "--budget", "x2.5", "--out", plan)
    *_, total, last = capsys.readouterr().out.splitlines()
    assert "by the paper's accounting" in total
    assert last.startswith("The packed file has ")
    assert plan.read_text().splitlines()[:2] == ["# Found by `fairseq-quant-noise plan --budget x2.5`.", f"# {last}."]


def test_without_moments_errors_count_alike_and_a_note_says_so(lab, runs, capsys):
    state = safe_load(runs.stock("plain").path)
    path = lab.checkpoint({**state, "last_optimizer_state": None})
    verb("plan", "--path", path, "--budget", BUDGET)
    assert "holds no second moments of Adam, so all errors count alike" in capsys.readouterr().err


def test_a_budget_of_half_the_network_is_met_without_codes(lab, runs, capsys):
    """In fp16 alone; no weight needs a stage."""
    path, plan, out = runs.stock("plain").path, lab.new("plan.yaml"), lab.new("packed.safetensors")
    found = planned(capsys, "--path", path, "--budget", "x1.5", "--out", plan)
    verb("quantize", "--path", path, "--plan", plan, "--out", out)
    assert found["file_bytes"] == out.stat().st_size
    packed = read(out)
    assert not packed.manifest.tensors
    assert all(map(packed.is_halved, packed.dense_names))


# Sharing and pruning


def test_the_plan_of_a_network_that_is_shared_and_pruned_says_so(lab, runs, capsys):
    """`quantize` does both; the size is that of its file, and x2.5 is of the whole network."""
    path, plan, out = runs.stock("plain").path, lab.new("plan.yaml"), lab.new("packed.safetensors")
    flags = "--share-layers", 2, "--share-from", "mean"
    found = planned(capsys, "--path", path, "--budget", 22_000, *flags, "--out", plan)
    assert yaml.safe_load(plan.read_text())["structure"] == {"share_layers": 2, "share_from": "mean"}
    verb("quantize", "--path", path, "--plan", plan, "--out", out)
    assert found["file_bytes"] == out.stat().st_size <= 22_000
    assert found["original_bytes"] > found["dense_bytes"]


def test_of_several_layers_to_keep_those_of_least_loss_are_taken(lab, runs, capsys):
    path, plan = runs.stock("plain").path, lab.new("plan.yaml")
    flags = ["--path", path, "--budget", 30_000, "--calibration-data", lab.data, "--json"]
    verb("plan", *flags, "--keep-layers", "all", "--keep-layers", "0", "--out", plan)
    said = capsys.readouterr()
    losses = dict(re.findall(r"--keep-layers (\w+): loss .* before and (.*) after", said.err))
    assert losses.keys() == {"all", "0"}
    best = min(losses, key=lambda keep: float(losses[keep]))
    assert json.loads(said.out)["losses"][1] == pytest.approx(float(losses[best]), abs=1e-3)
    assert yaml.safe_load(plan.read_text()).get("structure") == (None if best == "all" else {"keep_layers": "0"})


def least_budget(path, capsys):
    """The bytes of the smallest file, as the error of a smaller budget names them."""
    with pytest.raises(SystemExit, match="2"):
        verb("plan", "--path", path, "--budget", "1KB")
    return int(one_error(capsys.readouterr()).partition("network has ")[2].split()[0].replace(",", ""))


def test_layers_to_keep_that_do_not_fit_are_left_out_before_any_work(lab, runs, capsys):
    path, plan = runs.stock("plain").path, lab.new("plan.yaml")
    least = least_budget(path, capsys)
    keep = "--keep-layers", "all", "--keep-layers", "0"
    verb("plan", "--path", path, "--budget", least - 1, "--calibration-data", lab.data, *keep, "--out", plan)
    said = capsys.readouterr().err
    assert "--keep-layers all is left out: --budget: " in said
    assert said.index("is left out") < said.index("--keep-layers 0: loss")
    assert yaml.safe_load(plan.read_text())["structure"] == {"keep_layers": "0"}


def test_a_budget_that_leaves_nothing_for_a_training_says_so(runs, capsys):
    least = least_budget(runs.stock("plain").path, capsys)
    verb("plan", "--path", runs.stock("plain").path, "--budget", least)
    assert f"note: the smallest file takes {least:,} bytes; a training may record up to 512 more" in (
        capsys.readouterr().err
    )


def test_an_architecture_alone_gets_a_plan_whose_file_fits(lab, runs, capsys):
    """And that of a network of it, once trained, which has more options to record."""
    stock, plan, out = runs.stock("plain"), lab.new("plan.yaml"), lab.new("packed.safetensors")
    options = Checkpoint(stock.path).config
    dims = "decoder_embed_dim", "decoder_input_dim", "decoder_output_dim", "decoder_ffn_embed_dim"
    keys = "decoder_layers", "decoder_attention_heads", "share_decoder_input_output_embed", *dims
    sets = [part for key in keys for part in ("--set", f"{key}={str(options['cfg']['model'][key]).lower()}")]
    arch = ["--arch", "quant_noise_transformer_lm", "--vocab-size", options["vocab_size"], *sets]
    found = planned(capsys, *arch, "--budget", BUDGET, "--out", plan)
    assert found["file_bytes"] <= BUDGET
    verb("quantize", "--path", stock.path, "--plan", plan, "--out", out)
    assert 0.75 * BUDGET < out.stat().st_size <= BUDGET


# Loss against bytes


@pytest.fixture
def few_points(monkeypatch):
    monkeypatch.setattr(budget, "frontier", functools.partial(budget.frontier, count=3))
    monkeypatch.setattr(planning, "frontier", budget.frontier)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_frontier_has_the_best_plans_and_the_papers(lab, runs, few_points, suffix, capsys):
    path, picture = runs.stock("plain").path, lab.new(f"curve{suffix}")
    found = planned(capsys, "--path", path, "--frontier", "--out", picture)
    points = found["points"]
    best = [point for point in points if point["plan"] == "best"]
    uniform = [point for point in points if point["plan"] != "best"]
    assert {point["plan"] for point in uniform} == set(UNIFORM)
    assert len(best) >= 3
    assert all(later["predicted_loss"] <= earlier["predicted_loss"] for earlier, later in itertools.pairwise(best))
    assert [point["file_bytes"] for point in points] == sorted(point["file_bytes"] for point in points)
    for point in uniform:
        within = [other for other in best if other["file_bytes"] <= point["file_bytes"]]
        assert min(other["predicted_loss"] for other in within) <= point["predicted_loss"] * 1.001
        assert point["loss"] is None
    assert picture.read_bytes().startswith({".png": b"\x89PNG", ".svg": b"<?xml"}[suffix])


def test_the_losses_of_a_frontier_are_measured_on_data(lab, runs, few_points, capsys):
    path, data = runs.stock("plain").path, lab.data
    verb("plan", "--path", path, "--frontier", "--calibration-data", data)
    header, *rows, last = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "plan"
    assert header.endswith("loss")
    assert all(0 < float(row.split()[-1]) < 20 for row in rows)
    assert last.startswith("the dense network: ")
    assert last.endswith(f"on {data}")


def test_a_plan_for_a_loss_is_as_small_as_it_may_be(lab, runs, capsys):
    path, plan, size = runs.stock("plain").path, lab.new("plan.yaml"), BUDGET // 2
    flags = ["--path", path, "--calibration-data", lab.data]
    dense, after = planned(capsys, *flags, "--budget", size)["losses"]
    target = after + 0.1 * (after - dense)
    found = planned(capsys, *flags, "--target-loss", target, "--out", plan)
    assert dense < found["losses"][1] <= target
    assert found["file_bytes"] <= 1.03 * size
    assert plan.read_text().startswith("# Found by `fairseq-quant-noise plan --target-loss ")
    with pytest.raises(SystemExit, match="2"):
        verb("plan", *flags, "--target-loss", dense)
    assert f"the dense network has a loss of {dense:.3f}; give more" in one_error(capsys.readouterr())


WRONG = {
    "too small": ("--path {stock} --budget 9KB", ["9,000 bytes", "the smallest file of this network has"]),
    "larger than dense": ("--path {stock} --budget 1GiB", ["--budget 1GiB", "the dense network has"]),
    "as large as dense": ("--path {stock} --budget x1", ["--budget x1", "give less"]),
    "unknown unit": ("--path {stock} --budget 10Mb", ["--budget 10Mb", "10MiB"]),
    "no number": ("--path {stock} --budget small", ["--budget small"]),
    "nothing": ("--path {stock} --budget 0", ["--budget 0"]),
    "a ratio with a unit": ("--path {stock} --budget x2MB", ["--budget x2MB"]),
    "a plan too": ("--path {stock} --budget 40KB --plan {plan}", ["--plan", "--budget"]),
    "neither": ("--path {stock}", ["--plan", "--budget"]),
    "an architecture without words": ("--arch quant_noise_transformer_lm --budget 40KB", ["--vocab-size"]),
    "an architecture for a loss": ("--arch quant_noise_transformer_lm --frontier", ["--frontier", "--path"]),
    "layers without data": ("--path {stock} --budget 40KB --keep-layers all --keep-layers 0", ["--calibration-data"]),
    "layers that are not there": ("--path {stock} --budget 40KB --keep-layers 7", ["keep_layers", "layer 7"]),
    "layers with a plan": ("--path {stock} --plan {plan} --keep-layers 0", ["--keep-layers", "--budget"]),
    "sharing with a plan": ("--path {stock} --plan {plan} --share-layers 2", ["--share-layers", "structure"]),
    "a start without sharing": ("--path {stock} --budget 40KB --share-from mean", ["--share-from", "--share-layers N"]),
    "a start with a plan": ("--path {stock} --plan {plan} --share-from mean", ["--share-from", "--budget"]),
    "a loss that is no number": ("--path {stock} --target-loss nan --calibration-data {plan}", ["--target-loss nan"]),
    "no layer shares": ("--path {stock} --budget 40KB --share-layers 0", ["share_layers is 0"]),
    "quantized already": ("--path {ipq} --budget 40KB", ["{ipq}", "holds quantized weights already"]),
    "the checkpoint's name": ("--path {stock} --budget 40KB --out {stock}", ["--out {stock}"]),
    "no data": ("--path {stock} --budget 40KB --calibration-data /nowhere", ["--calibration-data /nowhere"]),
    "a file without a budget": ("--path {stock} --plan {plan} --out {plan}", ["--out", "--budget"]),
    "a loss without data": ("--path {stock} --target-loss 5", ["--target-loss", "--calibration-data"]),
    "a frontier and a budget": ("--path {stock} --frontier --budget 40KB", ["--frontier", "--budget"]),
    "a frontier that is no picture": ("--path {stock} --frontier --out {plan}", ["--out {plan}", ".svg or .png"]),
    "data without a budget": ("--path {stock} --plan {plan} --calibration-data {plan}", ["--calibration-data"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line(lab, runs, case, capsys):
    line, said = WRONG[case]
    paths = {"stock": runs.stock("plain").path, "ipq": runs.ipq("plain").path, "plan": lab.plan(PLANS["plain"])}
    before = paths["stock"].read_bytes()
    with pytest.raises(SystemExit, match="2"):
        verb("plan", *line.format(**paths).split())
    error = one_error(capsys.readouterr())
    assert all(text.format(**paths) in error for text in said), error
    assert paths["stock"].read_bytes() == before


def test_the_smallest_budget_that_an_error_names_is_enough(runs, capsys):
    path = runs.stock("plain").path
    least = least_budget(path, capsys)
    assert planned(capsys, "--path", path, "--budget", least)["file_bytes"] <= least


def test_a_budget_holds_whatever_variances_are_estimated(tmp_path):
    """A variance that fp16 cannot hold keeps its tensor in fp32, and only `quantize` knows which one does."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 64, 1), nn.BatchNorm2d(64), nn.Conv2d(64, 4, 1)).eval()
    plan = Plan.of({"stages": [{"match": "0", "block_size": 4, "n_centroids": 4}], "dense": "fp16"})
    planned = budget.file_bytes(budget.Subject(network, {}), plan)
    assert float(network[1].running_var[0]) == 1.0
    for variance in (1.0, 1e-7):
        with torch.no_grad():
            network[1].running_var.fill_(variance)
        made = quantize_(copy.deepcopy(network), plan, progress=str)
        size = save(made, tmp_path / "file.safetensors", plan)
        assert planned - 2 * 64 - 64 <= size <= planned
