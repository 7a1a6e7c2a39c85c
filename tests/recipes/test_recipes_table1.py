"""recipes/table1.sh without its trainings: its plans, its list of runs and its tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_quant_noise.plan.plan import Plan

ROOT = Path(__file__).parents[2]
SIZES = {"file_bytes": 700_000, "paper_bytes": 650_000.0, "dense_bytes": 5_250_000, "ratio": 7.5}


@pytest.fixture(autouse=True)
def _recipes_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


@pytest.fixture
def table():
    from recipes.table1 import table

    return table


@pytest.fixture
def plans():
    from recipes.table1 import plans

    return plans


def recipe(*args, **env):
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    command = ["bash", "recipes/table1.sh", *args]
    return subprocess.run(command, cwd=ROOT, env={"PATH": path, **env}, capture_output=True, text=True)


def listed():
    """Run -> the packed files that the recipe makes of it."""
    lines = recipe("--list").stdout.splitlines()
    return {name: files.split() for name, _, files in (line.partition(": ") for line in lines)}


def finish(out, run, *files):
    """The output of a run, as far as the table reads it."""
    (out / run).mkdir(parents=True, exist_ok=True)
    for file, loss in zip(("dense", *files), (6, 7, 8), strict=False):
        (out / run / f"eval-{file}.log").write_text(f"x\nLoss (base 2): {loss}.0000, Perplexity: {2**loss}.00\n")
        (out / run / f"{file}.safetensors").touch()


def test_the_recipe_makes_the_files_of_the_tables(table):
    made = {(run, file) for run, files in listed().items() for file in files}
    assert made == {(line.run, line.file) for line in table.LINES}


def test_table_1_has_twelve_lines_and_each_line_is_there_once(table):
    assert sum(line.table == table.TABLE1 for line in table.LINES) == 12
    names = [(line.table, line.row, line.scheme) for line in table.LINES]
    assert len(set(names)) == len(names)


def test_each_run_has_the_plans_that_it_trains_with(plans):
    written = plans.all_plans()
    for run, files in listed().items():
        assert (f"{run}/noise.yaml" in written) == (run in plans.NOISE)
        for file in files:
            if file.startswith("ipq"):
                assert f"{run}/{file}-plan.yaml" in written
            elif file.endswith("-channel"):
                assert f"plans/{file}.yaml" in written
            else:
                assert (ROOT / f"configs/plans/small_{file}.yaml").exists()


def test_every_plan_loads(plans):
    for plan in plans.all_plans().values():
        assert Plan.of(plan)


def test_noise_and_stages_of_small_yaml_are_of_the_same_weights_and_blocks(plans):
    def targets(rules):
        return [(rule.match, rule.block_size) for rule in rules]

    plan = Plan.of(plans.all_plans()["pq-clusters/ipq-plan.yaml"])
    small = Plan.of(ROOT / "configs/plans/small.yaml")
    assert plan.stages == small.stages
    assert targets(plan.noise) == targets(small.stages)
    assert {(rule.kind, rule.p, rule.choice) for rule in plan.noise} == {("pq", 0.05, "clusters")}


def test_small_ipq_int8_is_small_with_8_bits():
    small, int8 = (Plan.of(ROOT / f"configs/plans/{name}.yaml") for name in ("small", "small_ipq_int8"))
    assert int8.stages == small.stages
    assert (int8.centroids.dtype, int8.activations.bits) == ("int8", 8)


def test_plans_are_written(plans, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plans", str(tmp_path)])
    plans.main()
    assert Plan.of(tmp_path / "pq-qat/noise.yaml").noise[0].p == 1.0
    assert Plan.of(tmp_path / "plans/int4-channel.yaml").stages[0].range == "channel"
    assert not Plan.of(tmp_path / "none/ipq-plan.yaml").noise


def test_tables_of_the_runs_that_are_there(table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "read", lambda path: None)
    monkeypatch.setattr(table, "inspection", lambda path, packed: SIZES)
    finish(tmp_path, "none", "int4")
    finish(tmp_path, "proxy", "ipq")
    monkeypatch.setattr(sys, "argv", ["table", str(tmp_path)])
    table.main()
    text = (tmp_path / "table.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert ["none", "uncompressed", "64.00", "64.00", "5,250,000", "5,250,000", "x1.00", "18.3 r"] in rows
    assert ["none", "int4", "128.00", "64.00", "700,000", "650,000", "x7.50", "39.4 r"] in rows
    assert ["Quant-Noise", "iPQ", "128.00", "64.00", "700,000", "650,000", "x7.50", "20.7"] in rows
    assert ["proxy, subvectors", "iPQ", "64.00", "128.00", "18.3 r", "21.0 r"] in rows
    records = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert [(r["run"], r["ppl"], r["paper_is_recalled"]) for r in records[1:3]] == [
        ("none", 128.0, True),
        ("proxy", 128.0, False),
    ]
    assert f"{len(table.LINES) - 4} of {len(table.LINES)} lines are not there yet" in capsys.readouterr().out


def test_the_files_of_the_best_method_make_a_table_of_their_own(table, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "read", lambda path: None)
    monkeypatch.setattr(table, "inspection", lambda path, packed: SIZES)
    finish(tmp_path, "none", "int4", "ipq-best")
    monkeypatch.setattr(sys, "argv", ["table", str(tmp_path), "--method", "best"])
    table.main()
    records = [json.loads(line) for line in (tmp_path / "table-best.jsonl").read_text().splitlines()]
    assert [(r["scheme"], r["ppl"]) for r in records] == [("uncompressed", 64.0), ("int4", 128.0), ("iPQ", 256.0)]
    assert not (tmp_path / "table.md").exists()


def test_the_lines_of_one_run(table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "read", lambda path: None)
    monkeypatch.setattr(table, "inspection", lambda path, packed: SIZES)
    finish(tmp_path, "proxy", "ipq")
    monkeypatch.setattr(sys, "argv", ["table", str(tmp_path), "--run", "proxy"])
    table.main()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("Quant-Noise, iPQ: PPL 128.00; dense PPL 64.00; file bytes 700,000;")
    assert second.startswith("proxy, subvectors, iPQ: full PPL 64.00; quantized PPL 128.00;")
    assert not (tmp_path / "table.md").exists()


@pytest.mark.parametrize(
    ("args", "env", "message"),
    [
        (["--bad"], {}, "unknown argument --bad"),
        ([], {"ONLY": "none int5"}, "ONLY names a run 'int5'; there are: none int4-qat"),
        ([], {"JOBS": "0"}, "JOBS is '0'; give a whole number from 1 up"),
        ([], {"UPDATES": "many"}, "UPDATES is 'many'"),
        ([], {"METHOD": "own"}, "METHOD is own; give paper or best"),
    ],
)
def test_mistakes_are_one_line_that_names_the_cure(args, env, message):
    done = recipe(*args, **env)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


def test_one_folder_is_of_one_setting(tmp_path):
    (tmp_path / ".settings").write_text("UPDATES=4 IPQ_UPDATES=6 SEED=1 VOCAB_SIZE=4000")
    done = recipe(OUT=str(tmp_path))
    assert done.returncode == 2
    assert "holds runs of UPDATES=4 IPQ_UPDATES=6" in done.stderr
