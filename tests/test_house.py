"""The rules of the house beside import-linter's (pyproject.toml): the core runs without fairseq, files are short."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from toys import WITHOUT_FAIRSEQ

from fairseq_quant_noise.plan.plan import Plan

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fairseq_quant_noise"
CORE = [p for p in sorted(PACKAGE.rglob("*.py")) if p.relative_to(PACKAGE).parts[0] not in ("plugin", "models")]
FOLDERS = ("fairseq_quant_noise", "tests", "benchmarks", "scripts", "recipes")
OURS = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_every_module_of_the_core_imports_where_fairseq_is_not_installed():
    apart = ("__main__.py", "gpu_lookup.py")  # the latter is in Triton, which only a GPU's torch brings
    names = [module_name(path) for path in CORE if path.name not in apart]
    script = f"{WITHOUT_FAIRSEQ}\nimport importlib\nfor name in {names}:\n    importlib.import_module(name)\n"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert len(names) > 25


#: The rooms that know nothing of fairseq's files, networks and programs; docs/architecture.md says which ones do.
UNAWARE = (
    "accounting",
    "errors",
    "images",
    "kernels",
    "layers",
    "noise",
    "pq",
    "quantization",
    "scalar",
    "structure",
    "utils",
    "weights",
)


def test_rooms_with_nothing_of_fairseq_s_in_them_do_not_speak_of_it():
    of_rooms = [path for path in CORE if path.relative_to(PACKAGE).with_suffix("").parts[0] in UNAWARE]
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in of_rooms} == {*UNAWARE}
    name = re.compile(r"fairseq(?![_-]quant[_-]noise)|omegaconf|hydra|--(ddp|max|update)-", re.I)
    assert [str(path) for path in of_rooms if name.search(path.read_text())] == []


def test_no_file_is_over_400_lines():
    assert [str(p) for p in OURS if len(p.read_text().splitlines()) > 400] == []


def test_the_oldest_python_is_the_one_that_ruff_and_mypy_check_for():
    """mypy knows what each release's standard library has, ruff its syntax."""
    oldest = {
        re.search(pattern, (ROOT / name).read_text())[1].replace(", ", ".")
        for name, pattern in (
            ("pyproject.toml", r'requires-python = ">=(3\.\d+)"'),
            ("pyproject.toml", r'classifiers = \[\s+"Programming Language :: Python :: (3\.\d+)"'),
            ("pyproject.toml", r'python_version = "(3\.\d+)"'),
            ("scripts/setup.sh", r"not \((3, \d+)\) <= sys.version_info"),
        )
    }
    target = re.search(r'target-version = "py(3)(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest == {".".join(target.groups())}


def test_each_fault_that_is_mended_here_has_a_test_and_each_mark_a_row():
    page = (ROOT / "docs/upstream.md").read_text().partition("\n## ")[0]
    rows = {
        int(n): here for row, here in re.findall(r"^\| ([\d, ]+) \|.*\| (.*) \|$", page, re.M) for n in row.split(",")
    }
    texts = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    marks = {int(n) for text in texts for n in re.findall(r"mark\.upstream\((\d+)\)", text)}
    assert {n for n, here in rows.items() if not here.startswith("not done here")} <= marks <= rows.keys()


@pytest.mark.parametrize("path", sorted((ROOT / "configs/plans").glob("*.yaml")), ids=lambda p: p.name)
def test_every_plan_in_configs_loads(path):
    plan = Plan.of(path)
    assert plan.stages or plan.noise
