"""`report` over finished runs: the figures on the page are those of the files, and files cannot write HTML."""

import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toys import INT_PLANS, ZOO_PLAN, quiet, refuses, zoo

from fairseq_quant_noise import quantize_, save
from fairseq_quant_noise.artifact.codebooks import entropy
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.report import write_report
from fairseq_quant_noise.report.logs import read_log
from fairseq_quant_noise.report.scores import Point, pareto, scores_in

ROOT = Path(__file__).parents[2]
EVIL = "<script>alert('x')</script>&\"$x_1$"
STAMP = "2026-01-02 03:04:05 | INFO"
TRAINING = f"""\
{STAMP} | train_inner | epoch 001:     50 / 357 loss=11.7, ppl=3474.95, num_updates=50, lr=0.0005, \
distortion_fc1_weight=0.22, distortion_fc1_output=None
{STAMP} | fairseq_quant_noise.plugin.training.stages | stage 1 of 2: quantizing 1 weights, 'layers.*fc1'
{STAMP} | fairseq_quant_noise.quantization.quantize | stage 1 of 2 [1/1] decoder.layers.0.fc1 (512, 128) d 8 K 256 \
relative error 0.5166, 1 s left
{STAMP} | valid | epoch 001 | valid on 'valid' subset | loss 9 | ipq_mib 0.5 | ppl 512.25 | num_updates 60 | best_loss 9
{STAMP} | valid | epoch 001 | valid on 'other' subset | loss 9 | ppl 2.35e+06 | num_updates 60
{STAMP} | fairseq_quant_noise.plugin.training.stages | stage 2 of 2: quantizing 1 weights, '{EVIL}'
{STAMP} | valid | {{"epoch": 1, "valid_loss": "8.5", "valid_ppl": "362.04", "valid_num_updates": "90"}}
{STAMP} | train_inner | epoch 001:     99 / 357 loss=11.7, num_updates=100, ipq_codes_changed=1.5, ipq_distortion=0.4
{STAMP} | train | epoch 001 | loss 11 | num_updates 120 | ipq_codes_changed 9.9 | ipq_distortion 0.9
{STAMP} | train_inner | {{"epoch": 2, "num_updates": "150", "ipq_codes_changed": "0.25", "ipq_distortion": "0.3"}}
{STAMP} | fairseq_cli.train | done training in 61.5 seconds
"""


def evaluation(loss):
    return f"cfg {{'task': {{'data': '/data/bin'}}}}\nLoss (base 2): {loss:.4f}, Perplexity: {2**loss:.2f}\n"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Two runs as the recipes leave them, one with a name and a log that would like to be HTML."""
    out = tmp_path_factory.mktemp("runs")
    for name in ("plain", EVIL.replace("/", "|")):
        run = out / name
        run.mkdir()
        for file, plan, loss in (("model", ZOO_PLAN, 8.0), ("int8", INT_PLANS["int8"], 6.5)):
            save(quantize_(zoo(), plan, progress=quiet), run / f"{file}.safetensors", plan)
            (run / f"eval-{'packed' if file == 'model' else file}.log").write_text(evaluation(loss))
        (run / "eval-dense.log").write_text(evaluation(6))
        (run / "ipq.log").write_text(TRAINING)
        step = {"step": f"train {EVIL}", "seconds": 75, "command": "train", "recipe": f"NOISE=0 bash {EVIL}"}
        (run / "steps.jsonl").write_text(json.dumps(step) + "\nnot JSON\n")
    return out


@pytest.fixture(scope="module")
def report(out, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new"
    write_report([out], folder)
    return folder


@pytest.fixture(scope="module")
def numbers(report):
    return json.loads((report / "report.json").read_text())


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.data = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.data.append(data)


def test_a_score_stands_with_the_bytes_of_its_file(out, numbers):
    found = {(p["label"], round(p["score"], 2), p["bytes"]) for p in numbers["points"] if p["run"] == "plain"}
    sizes = {name: (out / "plain" / f"{name}.safetensors").stat().st_size for name in ("model", "int8")}
    dense = 4 * sum(t.numel() for t in {id(p): p for p in (*zoo().parameters(), *zoo().buffers())}.values())
    assert found == {("ipq", 256.0, sizes["model"]), ("int8", 90.51, sizes["int8"]), ("dense", 64.0, dense)}
    assert {p["data"] for p in numbers["points"]} == {"/data/bin"}


def test_the_page_needs_no_other_file_and_no_script(report):
    tags = Tags((report / "index.html").read_text()).found
    assert {tag for tag, _ in tags} & {"script", "link", "iframe", "object"} == set()
    sources = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert len(sources) == len(list(report.glob("*.png"))) > 6
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    links = [attributes["href"] for tag, attributes in tags if tag == "a"]
    assert all(link.startswith("#") for link in links)
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", (report / "index.html").read_text())


def test_names_and_logs_are_text_on_the_page(report):
    page = Tags((report / "index.html").read_text())
    assert not any(name.startswith("on") for _, attributes in page.found for name in attributes)
    assert any(EVIL in data for data in page.data)


def test_every_figure_of_the_tables_is_on_the_page(report):
    data = Tags((report / "index.html").read_text()).data
    assert {"90.51", "512.25", "362.04", "0.5166", "0.2200", "75"} <= set(data)
    assert any("recalled" in text for text in data)
    assert any(f"NOISE=0 bash {EVIL}" in text for text in data)


def test_a_log_tells_stages_errors_distortion_and_time(tmp_path):
    (tmp_path / "ipq.log").write_text(TRAINING)
    log = read_log(tmp_path / "ipq.log")
    assert log.stages == {1: (50, "layers.*fc1"), 2: (60, EVIL)}
    assert [(v.update, v.stage, v.values["ppl"]) for v in log.validations] == [
        *((60, 1, 512.25), (60, 1, 2.35e6), (90, 2, 362.04))
    ]
    assert log.encoded["decoder.layers.0.fc1"].error == 0.5166
    assert log.distortion == {("fc1", "weight"): [(50, 0.22)]}
    assert log.codes_changed == [(100, 1.5), (150, 0.25)]
    assert log.latent_error == [(100, 0.4), (150, 0.3)]
    assert log.seconds == 61.5


@pytest.mark.parametrize("value", ["9" * 500, "1.2.3", "1e999", "NaN", "None", "[[" * 5000, "a" * 100_000])
def test_a_log_and_a_table_may_hold_anything(tmp_path, value):
    text = TRAINING.replace("512.25", value).replace("362.04", value).replace("61.5", value).replace("0.5166", value)
    (tmp_path / "ipq.log").write_text(text + text.replace("num_updates", "num_updates 1").replace("60", value))
    (tmp_path / "eval-dense.log").write_text(
        f"Loss (base 2): {value}, Perplexity: {value}\nvalid on 'valid' subset | {value}"
    )
    row = {"run": "a", "ppl": 3.0, "file_bytes": 10}
    lines = [f'{{"ppl": {value}, "file_bytes": {value}}}', f'{{"seconds": {value}}}', json.dumps(row)]
    for name in ("table.jsonl", "steps.jsonl", "encoder.json"):
        (tmp_path / name).write_text("\n".join(lines))
    runs = write_report([tmp_path], tmp_path / "report")
    assert [p.score for p in runs.points] == [3.0]


def test_a_staged_checkpoint_knows_better_than_the_log_when_its_stages_began(out, tmp_path):
    (tmp_path / "ipq").mkdir()
    for name in ("ipq.log", "model.safetensors"):
        (tmp_path / name).write_bytes((out / "plain" / name).read_bytes())
    stages = {"quant_noise_stages": {"done": 2, "origin": 10, "starts": [0, 45]}}
    torch.save({"model": {}, "extra_state": stages}, tmp_path / "ipq/checkpoint_last.pt")
    runs = write_report([tmp_path], tmp_path / "report")
    assert runs.logs[0][1].stages == {1: (10, "layers.*fc1"), 2: (55, EVIL)}


def test_codebook_use_is_counted_from_the_codes(out, numbers):
    from safetensors.torch import load_file

    codes = load_file(out / "plain/int8.safetensors")["fc.weight.codes"]
    counts = torch.bincount(codes.long())
    p = counts[counts > 0] / counts.sum()
    use = next(u for u in numbers["codebooks"] if u["file"] == "int8.safetensors" and u["tensor"] == "fc.weight")
    assert (use["used"], use["centroids"], use["capacity"]) == (int((counts > 0).sum()), 256, 8.0)
    assert use["entropy"] == pytest.approx(float(-(p * p.log2()).sum()), abs=1e-5)


def test_entropy_is_log2_k_for_equal_counts_and_0_for_one_centroid():
    assert entropy(torch.tensor([5, 5, 5, 5])) == 2.0
    assert math.copysign(1, entropy(torch.tensor([0, 9, 0]))) == 1.0
    assert entropy(torch.tensor([0, 9, 0])) == 0.0


@pytest.mark.parametrize(("metric", "front"), [("ppl", ["small", "large"]), ("accuracy", ["small", "middle"])])
def test_the_pareto_front_leaves_out_what_another_beats_in_both(metric, front):
    sizes = {"small": (30.0, 1.0), "middle": (31.0, 2.0), "large": (20.0, 3.0), "larger": (20.0, 4.0)}
    points = [Point("run", name, metric, *values, "", "") for name, values in sizes.items()]
    assert [p.label for p in pareto(points)] == front


def test_scores_of_the_three_programs_are_read(tmp_path):
    log = tmp_path / "eval.log"
    for text, scores in (
        (evaluation(5), {"ppl": 32.0}),
        (
            "| valid on 'valid1' subset | accuracy 40.5 | x\n| valid on 'valid' subset | loss 1 | accuracy 41.5 | x",
            41.5,
        ),
        ("Generate test with beam=5: BLEU|nrefs:1|case = 30.17 60.1/30.2", {"bleu": 30.17}),
        ("nothing", {}),
    ):
        log.write_text(text)
        assert scores_in(log) == (scores if isinstance(scores, dict) else {"accuracy": scores})


def test_tables_of_json_lines_alone_make_a_report(tmp_path):
    """The committed summaries of runs whose files are gone; the lines say which run they are of."""
    record = {"run": "a", "ppl_dense": 80.0, "ppl_ipq": 158.7, "dense_bytes": 5_221_380, "file_bytes": 309_788}
    row = {"run": "b", "scheme": "int4", "ppl": 97.1, "file_bytes": 693_348}
    seed = {"run": "c/ipq", "seed": 2, "ppl": 99.0, "bytes": 7}
    (tmp_path / "table.jsonl").write_text("\n".join([json.dumps(record), "[]", json.dumps(row), json.dumps(seed)]))
    runs = write_report([tmp_path], tmp_path / "report")
    assert {(p.run, p.label, p.score) for p in runs.points} == {
        *(("a", "dense", 80.0), ("a", "ipq", 158.7), ("b", "int4", 97.1), ("seed-2/c", "ipq", 99.0))
    }
    page = (tmp_path / "report/index.html").read_text()
    assert "The runs have nothing for this." in page  # no stages, no time


def test_a_table_and_a_result_beside_the_logs_that_they_are_made_of_add_no_point(out, numbers, tmp_path):
    shutil.copytree(out / "plain", tmp_path / "plain")
    points = {p["label"]: p for p in numbers["points"] if p["run"] == "plain"}
    rows = [{"run": "plain", "scheme": "iPQ", "ppl": points["ipq"]["score"], "file_bytes": points["ipq"]["bytes"]}]
    rows += [{"run": "gone", "scheme": "iPQ", "ppl": 300.0, "file_bytes": 5}]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = {"ppl_ipq": 256.0, "ppl_dense": 64.0, "file_bytes": 7, "dense_bytes": 8}
    (tmp_path / "plain/result.json").write_text(json.dumps(result))
    runs = write_report([tmp_path], tmp_path / "report")
    assert sorted((p.run, p.label) for p in runs.points) == [
        *(("gone", "iPQ"), ("plain", "dense"), ("plain", "int8"), ("plain", "ipq"))
    ]
    assert {p.data for p in runs.points} == {"/data/bin"}


def test_what_is_missing_or_damaged_is_said(out, tmp_path):
    whole = (out / "plain/model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole)
    (tmp_path / "broken.safetensors").write_bytes(whole[:-1])
    (tmp_path / "eval-packed.log").write_text("it was killed")
    (tmp_path / "eval-gone.log").write_text(evaluation(3))
    runs = write_report([tmp_path], tmp_path / "report")
    notes = " / ".join(runs.notes)
    for text in (
        "broken.safetensors is left out",
        "no score in eval-packed.log",
        "eval-gone.log has a score",
        "stages",
    ):
        assert text in notes
    assert not runs.points


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_a_folder_without_results_is_a_mistake_of_one_line(tmp_path, name, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path / name), "--out", str(tmp_path / "report")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: report {tmp_path / name}: no ")
    assert error.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_an_output_that_is_a_file_is_refused(out, tmp_path):
    (tmp_path / "file").touch()
    with refuses("--out .*file: .*; give a folder"):
        write_report([out / "plain"], tmp_path / "file")


def test_the_verb_prints_what_it_wrote(out, tmp_path, capsys):
    main(["report", str(out / "plain"), str(out / "plain"), "--out", str(tmp_path), "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert Path(summary["page"]).is_file()
    assert summary["runs"] == ["plain"]


def test_without_matplotlib_the_error_says_how_to_get_it(out, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with refuses("matplotlib; run `pip install 'matplotlib"):
        write_report([out / "plain"], tmp_path / "report")


def test_a_step_of_a_recipe_leaves_its_time_its_command_and_the_recipes_own(tmp_path):
    script = tmp_path / "recipe.sh"
    script.write_text(
        f'set -euo pipefail\n. {ROOT}/recipes/lib.sh\nhello() {{ echo "$@"; }}\n'
        f"step 'say \"it\" \\ now' {tmp_path}/.done hello $'two\\nlines' 'q\"'\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "NOISE": "0.1"}
    subprocess.run(["bash", script, "a b"], check=True, env=environment, capture_output=True)
    record = json.loads((tmp_path / "steps.jsonl").read_text())
    assert record == {
        "step": 'say "it" \\ now',
        "seconds": record["seconds"],
        "command": "hello $'two\\nlines' q\\\"",
        "recipe": f"NOISE=0.1 bash {script} a\\ b",
    }
    assert record["seconds"] in (0, 1, 2)
