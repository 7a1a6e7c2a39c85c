"""The table of what is replaced in fairseq: each name is there and takes the same; the package alone replaces none."""

import functools
import inspect
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from toys import python, refuses

import fairseq_quant_noise.plugin
from fairseq_quant_noise.plugin.patches import PATCHES

ROOT = Path(__file__).parents[2]
ROWS = {int(n) for line in re.findall(r"^\| ([\d, ]+) \|", (ROOT / "docs/upstream.md").read_text(), re.MULTILINE)
        for n in line.split(",")}  # fmt: skip
TARGETS = [patch.target for patch in PATCHES]

#: In a program of its own: the signatures of fairseq's own functions, before and after the package is imported alone.
UNTOUCHED = """
import importlib, inspect, json, sys
import fairseq.trainer, fairseq.checkpoint_utils, fairseq.quantization_utils, fairseq.optim.fp16_optimizer
import fairseq.data.language_pair_dataset, fairseq.data.token_block_dataset, fairseq.modules.dynamic_crf_layer

def find(target):
    path, _, name = target.rpartition(".")
    try:
        owner = importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, kind = path.rpartition(".")
        owner = getattr(importlib.import_module(module), kind)
    return inspect.getattr_static(owner, name)

before = [find(target) for target in TARGETS]
evals = [m for m in list(sys.modules.values()) if "eval" in getattr(m, "__dict__", {}) and m.__name__[:7] == "fairseq"]
import fairseq_quant_noise
fairseq_quant_noise.load, fairseq_quant_noise.Plan
assert all(find(target) is one for target, one in zip(TARGETS, before))
assert not evals and "eval" not in vars(fairseq.checkpoint_utils)
assert "fairseq_quant_noise.plugin" not in sys.modules
ACTION
assert "eval" in vars(fairseq.checkpoint_utils)
print(json.dumps([find(target) is not one for target, one in zip(TARGETS, before)]))
"""


@pytest.mark.parametrize("action", ["fairseq_quant_noise.register()", "import fairseq_quant_noise.models.roberta"])
def test_the_package_alone_replaces_nothing_in_fairseq_and_registering_all_of_it(action):
    script = UNTOUCHED.replace("ACTION", action).replace("TARGETS", repr(TARGETS))
    done = python("-c", script, fresh=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(json.loads(done.stdout.splitlines()[-1]))


def test_user_dir_installs_it():
    """As fairseq's programs import it: by its path, when nothing has imported it before."""
    script = (
        "import argparse, fairseq.utils, fairseq.trainer\n"
        f"fairseq.utils.import_user_module(argparse.Namespace(user_dir={str(ROOT / 'fairseq_quant_noise')!r}))\n"
        "from fairseq.models import MODEL_REGISTRY\n"
        "print(fairseq.trainer.Trainer.train_step.__module__, 'quant_noise_roberta' in MODEL_REGISTRY)\n"
    )
    done = python("-c", script, fresh=False)
    assert done.stdout.split() == ["fairseq_quant_noise.plugin.training.divergence", "True"], done.stderr[-2000:]


def test_registering_again_reaches_modules_of_fairseq_that_were_imported_since(monkeypatch):
    late = ModuleType("fairseq.imported_late")
    monkeypatch.setitem(sys.modules, late.__name__, late)
    fairseq_quant_noise.register()
    assert vars(late)["eval"]("[1, 2]") == [1, 2]
    with refuses("which fairseq would run as code"):
        vars(late)["eval"]("print(1)")


def test_each_name_is_replaced_once():
    assert len(set(TARGETS)) == len(TARGETS)


@pytest.mark.parametrize("patch", PATCHES, ids=TARGETS)
def test_a_name_that_is_there_is_replaced_by_what_is_called_alike(patch):
    """fairseq's own function is in `original`, as it was when the table was made."""
    owner, name = patch.place
    assert vars(owner)[name] is patch.by
    assert patch.why
    assert patch.row is None or patch.row in ROWS
    if inspect.isfunction(patch.original) and inspect.isfunction(patch.by):
        theirs, ours = (list(inspect.signature(f).parameters.values()) for f in (patch.original, patch.by))
        rest = [one for one in ours if one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]  # handed on as they are
        named = [(one.name, one.default) for one in ours if one not in rest]
        expected = [(one.name, one.default) for one in theirs if one.kind is not one.VAR_KEYWORD]
        first = {"self": "trainer"}.get(expected[0][0], expected[0][0])  # of a method
        assert named == [(first, expected[0][1]), *expected[1:]][: len(named) if rest else None]
    elif isinstance(patch.by, functools.partialmethod):
        assert inspect.isfunction(patch.original)


def test_nothing_else_of_the_package_assigns_to_fairseq():
    assigns = re.compile(r"^\s*(fairseq\.[\w.]+|_Trainer\.\w+) = ", re.MULTILINE)
    folder = Path(fairseq_quant_noise.plugin.__file__).parent
    assert [str(path) for path in folder.rglob("*.py") if assigns.search(path.read_text())] == []
