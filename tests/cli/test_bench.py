"""The verb `bench`: the programs in benchmarks/, with what programs read of them."""

import importlib
import json
import re
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from lm_fixture import ROOT, one_error
from toys import python

from fairseq_quant_noise.cli import main as cli
from fairseq_quant_noise.cli import programs

SMALL = {
    "noise": "--layers 1 --dim 64 --words 200 --tokens 128",
    "finetune": "--layers 1 --dim 64 --words 200 --tokens 128",
    "encode": "--rows 64 --columns 64",
    "infer": "--batches 64",
    "generate": "--tokens 2 --layers 1 --dim 128 --words 1000",
}


@pytest.mark.parametrize("claim", SMALL)
def test_a_benchmark_prints_its_claims(claim, monkeypatch):
    ran = []
    run = SimpleNamespace(run=lambda line: ran.append(python(*line[1:], fresh=False)) or ran[0])
    monkeypatch.setattr(programs, "subprocess", run)
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", claim, *SMALL[claim].split(), "--repeats", "1", "--threads", "1", "--json"])
    assert end.value.code == 0, ran[0].stderr[-2000:]
    claims = json.loads(ran[0].stdout.splitlines()[-1])
    assert len(claims) >= 2
    for found in claims:
        assert {"claim", "ours", "peer", "peer_name", "ratio", "target", "unit", "holds", "machine"} <= set(found)
        sign, bound = found["target"].split()
        assert found["holds"] == (found["ratio"] <= float(bound) if sign == "<=" else found["ratio"] >= float(bound))
        assert found["ratio"] in (
            pytest.approx(found["ours"] / found["peer"]),
            pytest.approx(found["peer"] / found["ours"]),
        )


def test_without_a_checkout_it_says_where_to_run_it(monkeypatch, tmp_path, capsys):
    package = tmp_path / "site-packages" / "fairseq_quant_noise"
    monkeypatch.setattr(programs, "__file__", str(package / "cli" / "programs.py"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "noise"])
    assert caught.value.code == 2
    assert "run it in a checkout of the repository" in one_error(capsys.readouterr())


def test_growth_prints_what_was_measured_beside_the_floor():
    arguments = "--largest 294912 --tokens 128 --repeats 1 --threads 1 --json"
    done = python("benchmarks/growth.py", *arguments.split(), fresh=False)
    assert done.returncode == 0, done.stderr[-2000:]
    encode, noise = json.loads(done.stdout.splitlines()[-1])
    assert (encode["what"], encode["numbers"], noise["what"], noise["tokens"]) == ("encode", 294_912, "noise", 128)
    assert encode["floor"] > 0
    assert noise["floor"] > 0


def test_noise_sends_nothing_and_the_ranks_divide_the_work_of_a_stage():
    arguments = "--ranks 1 2 --layers 2 --tokens 16 --dim 32 --repeats 1 --json"
    done = python("benchmarks/ranks.py", *arguments.split(), fresh=False)
    assert done.returncode == 0, done.stderr[-2000:]
    alone, two = json.loads(done.stdout.splitlines()[-1])
    assert (alone["ranks"], two["ranks"], two["numbers"]) == (1, 2, 2 * 8 * 32 * 32)
    assert (alone["plain bytes"], alone["stage bytes"]) == (0, 0)
    assert two["noised bytes"] == two["plain bytes"] > 4 * two["numbers"]
    assert 0 < two["stage bytes"] < two["plain bytes"]


@pytest.mark.parametrize("claim", ["graphs", "phone"])
def test_without_onnxruntime_its_benchmarks_say_what_to_install(claim):
    if find_spec("onnxruntime") and find_spec("onnx") and find_spec("onnx_ir"):
        pytest.skip("onnxruntime is installed")
    done = python(f"benchmarks/{claim}.py", "--layers", "1", fresh=False)
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: onnx\w* is not installed; run: pip install onnxruntime onnx onnx_ir", last(done.stderr)
    )


@pytest.fixture
def onnxruntime():
    for name in ("onnxruntime", "onnx", "onnx_ir"):
        pytest.importorskip(name, reason=f"{name} is not installed")


@pytest.mark.slow
def test_exported_models_are_measured_beside_onnxruntime_s_own(onnxruntime):
    few = ["--layers", "1", "--words", "200", "--cases", "1x4", "--repeats", "1", "--threads", "1", "--json"]
    done = python("benchmarks/graphs.py", *few, fresh=False)
    assert done.returncode == 0, done.stderr[-2000:]
    claims = json.loads(last(done.stdout))
    assert len(claims) == 11
    assert {claim["peer_name"] for claim in claims} == {"onnxruntime fp32", "onnxruntime int8", "onnxruntime 4-bit"}


def test_a_model_and_its_ort_form_are_measured_in_processes_of_their_own(onnxruntime, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    phone = importlib.import_module("phone")
    network, form, part, path, packed = next(phone.models(1, 200, tmp_path))
    assert (network, form, part) == ("roberta", "dense", "classes")
    assert abs(packed - path.stat().st_size) < 0.1 * packed
    ready = phone.converted(path)
    for found in (phone.measured(path, part, 1), phone.measured(ready, part, 1, "--ort")):
        assert found["at most"] >= found["at rest"] > 0.5 * packed
        assert found["seconds"] > 0


def last(text):
    """The last line of a text."""
    return text.splitlines()[-1]


@pytest.mark.parametrize("option", ["--batches 0", "--threads -1", "--repeats x"])
def test_a_count_that_counts_nothing_is_refused(option):
    name, value = option.split()
    done = python("benchmarks/infer.py", f"{name}={value}", fresh=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"infer.py: error: argument {name}: '{value}': give a whole number, 1 or more"
    )
