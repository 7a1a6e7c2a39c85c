"""Checkpoints made to run something: nothing runs, on any way in. What would run leaves a file, the canary."""

import builtins
import contextlib
import ctypes
import functools
import importlib
import os
import pickle
import runpy
import subprocess
import timeit
import zipfile
from argparse import Namespace
from collections import OrderedDict

import numpy as np
import pytest
import torch
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.utils import import_user_module
from lm_fixture import PLANS, ipq_flags, one_error, state_of
from toys import refuses

from fairseq_quant_noise.checkpoints.safe_load import safe_load
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.errors import DamagedFileError, UserError
from fairseq_quant_noise.plugin.literals import literal


class Calls:
    """Unpickling it calls `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def attacks(canary):
    """Calls, by what a pickle of them may be refused for: the name of a global, as a pattern."""
    shell, code = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    inner = pickle.dumps(Calls(os.system, shell))
    return {
        "posix.system": Calls(os.system, shell),
        "(commands|subprocess).Popen": Calls(subprocess.Popen, ["touch", str(canary)]),
        "(commands|subprocess).check_output": Calls(subprocess.check_output, ["touch", str(canary)]),
        "eval": Calls(builtins.eval, code),
        "exec": Calls(builtins.exec, code),
        "compile": Calls(builtins.compile, code, "x", "eval"),
        "getattr|importlib": Calls(getattr, Calls(importlib.import_module, "os"), "system"),
        "io.open": Calls(builtins.open, str(canary), "w"),
        "importlib.import_module": Calls(importlib.import_module, "antigravity"),
        "runpy.run_path": Calls(runpy.run_path, f"{canary}.py"),
        "timeit.timeit": Calls(timeit.timeit, code),
        "ctypes.CDLL": Calls(ctypes.CDLL, f"{canary}.so"),
        "functools.partial": Calls(functools.partial, os.system, shell),
        "pickle.loads": Calls(pickle.loads, inner),
        "torch.serialization.load": Calls(torch.load, f"{canary}.pt"),
        "torch.storage._load_from_bytes": Calls(torch.storage._load_from_bytes, inner),
        "torch.hub.load": Calls(torch.hub.load, "owner/name", "model"),
        "numpy.*load": Calls(np.load, f"{canary}.npy"),
    }


def nests(attack):
    """A checkpoint's content for each place that may hold something."""
    weight = torch.ones(2)
    return {
        "args": {"model": {}, "args": attack},
        "an option": {"model": {}, "args": Namespace(arch="x", lr=Namespace(deep=[(attack,)]))},
        "a section": {"model": {}, "cfg": {"model": {"_name": attack}}},
        "a weight": {"model": OrderedDict(w=weight, v=attack)},
        "extra_state": {"model": {"w": weight}, "extra_state": {"train_iterator": [attack]}},
        "a meter": {"model": {"w": weight}, "extra_state": {"train_meters": attack}},
        "optimizer": {"model": {"w": weight}, "last_optimizer_state": {"state": {0: attack}}},
        "task_state": {"model": {"w": weight}, "task_state": attack},
        "beside": {"model": {"w": weight}, "unheard of": {"x": attack}},
    }


def save_zip(content, path):
    torch.save(content, path)


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_bare(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.upstream(23)
@pytest.mark.parametrize("name", list(attacks("")))
def test_nothing_runs_wherever_a_checkpoint_holds_it_and_the_global_is_named(tmp_path, name):
    canary, place = tmp_path / "canary", tmp_path / "checkpoint.pt"
    for content in nests(attacks(canary)[name]).values():
        for save in (save_zip, save_legacy, save_bare):
            save(content, place)
            names = rf"({name}|torch.storage._load_from_bytes)"  # of a bare pickle's tensors
            with refuses(rf"refused, its pickle calls for {names}, which could run code", DamagedFileError):
                safe_load(place)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_function_of_fairseqs_is_never_called(tmp_path):
    """Its classes stand in old checkpoints, and come as placeholders."""
    canary, place = tmp_path / "canary", tmp_path / "checkpoint.pt"
    canary.mkdir()
    (canary / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for content in nests(Calls(import_user_module, Namespace(user_dir=str(canary)))).values():
        save_zip(content, place)
        with contextlib.suppress(DamagedFileError):
            safe_load(place)
    assert not (tmp_path / "ran").exists()


def reconstruct(function, *args):
    return {"model": {"w": Calls(function, *args)}}


STORAGE = torch.ones(4).storage()
BROKEN = {
    "a tensor without a storage": reconstruct(torch._utils._rebuild_tensor_v2, 5, 0, (2,), (1,), False, OrderedDict()),
    "a shape beyond the storage": reconstruct(
        torch._utils._rebuild_tensor_v2, STORAGE, 0, (10**9,), (1,), False, OrderedDict()
    ),
    "a negative offset": reconstruct(torch._utils._rebuild_tensor_v2, STORAGE, -8, (2,), (1,), False, OrderedDict()),
    "one number seen as many": reconstruct(
        torch._utils._rebuild_tensor_v2, STORAGE, 0, (10**7, 10**7), (0, 0), False, OrderedDict()
    ),
    "a tensor without memory": {"model": {"w": torch.empty(2, device="meta")}},
    "a sparse tensor": {"model": {"w": torch.eye(2).to_sparse()}},
    "a number for a weight": {"model": {"w": 5}},
    "a weight without a name": {"model": {5: torch.ones(2)}},
    "weights in a list": {"model": [torch.ones(2)]},
    "options in a list": {"model": {}, "cfg": {"model": [1]}},
    "an array of numpy": reconstruct(
        importlib.import_module("numpy._core.multiarray")._reconstruct, np.ndarray, (0,), b"b"
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_tensor_or_asks_for_more_memory_than_the_file_is_refused(tmp_path, name):
    for save in (save_zip, save_legacy):
        try:
            save(BROKEN[name], tmp_path / "checkpoint.pt")
        except NotImplementedError:  # of the older format, where torch has no such tensor
            continue
        with refuses(r"^checkpoint .*checkpoint\.pt: (refused|not a whole)", DamagedFileError):
            safe_load(tmp_path / "checkpoint.pt")


def test_a_zip_that_unfolds_to_more_than_the_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "checkpoint.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickle.dumps({"model": {}}, protocol=2))
        file.writestr("archive/data/0", bytes(1 << 22))
    with refuses("it unfolds from .* to 4,19.,... bytes; save it with torch.save", DamagedFileError):
        safe_load(tmp_path / "checkpoint.pt")


# Every way in


@pytest.fixture
def canary(lab):
    """The path of a file that only hostile code makes."""
    path = lab.new("canary")
    yield path
    assert not path.exists()


def ways(lab, runs, path):
    """Each way that a file comes in, by the command line's words."""
    out, plan, stock = lab.new("out"), lab.plan(PLANS["plain"]), runs.stock("plain").path
    staged = ["--finetune-from-model", stock, "--quantization-config-path", plan, *ipq_flags("plain")]
    lines = {
        "plan": ["plan", "--path", path, "--plan", plan],
        "quantize": ["quantize", "--path", path, "--plan", plan, "--out", out],
        "export": ["export", "--path", path, "--out", out],
        "prune": ["prune", "--path", path, "--keep", "0", "--out", out],
        "share": ["share", "--path", path, "--share-layers", "2", "--out", out],
        "to-dense": ["to-dense", path, "--out", out],
    }
    return out, {
        **{name: functools.partial(main, list(map(str, line))) for name, line in lines.items()},
        "--restore-file": lambda: lab.train("--restore-file", path, updates=1),
        "--finetune-from-model": lambda: lab.train("--finetune-from-model", path, updates=1),
        "--ipq-teacher": lambda: lab.train(*staged, "--ipq-teacher", path, updates=1),
        "eval-lm": lambda: lab.eval_lm(path),
        "validate": lambda: lab.validate(path),
        "from_pretrained": lambda: TransformerLanguageModel.from_pretrained(
            str(path.parent), path.name, str(lab.data), data=str(lab.data)
        ),
    }


@pytest.mark.upstream(23)
def test_a_hostile_checkpoint_runs_nothing_on_any_way_in(lab, runs, canary, capsys):
    path = lab.checkpoint({**state_of(runs.stock("plain").path), "task_state": Calls(os.system, f"touch {canary}")})
    out, each = ways(lab, runs, path)
    capsys.readouterr()
    said = "its pickle calls for posix.system"
    with refuses(said, DamagedFileError):
        each.pop("from_pretrained")()
    for name, way in each.items():
        with pytest.raises(SystemExit) as end:
            way()
        assert end.value.code == 3, name
        assert said in one_error(capsys.readouterr()), name
        assert not out.exists(), name


def configured(lab, state, **options):
    """A checkpoint whose model has these options."""
    cfg = {**state["cfg"], "model": {**state["cfg"]["model"], **options}}
    return lab.checkpoint({**state, "cfg": cfg})


@pytest.mark.parametrize("option", ["adaptive_softmax_cutoff", "adaptive_input_cutoff", "character_filters"])
def test_code_in_an_option_that_fairseq_evaluates_does_not_run(lab, runs, canary, capsys, option):
    """fairseq's own models give it to Python's eval."""
    state = state_of(runs.stock("plain").path)
    code = f"__import__('os').system('touch {canary}')"
    path = configured(lab, state, **{option: code, "character_embeddings": True, "adaptive_input": True})
    capsys.readouterr()
    for way in (lab.eval_lm, lab.validate):
        with pytest.raises(SystemExit) as end:
            way(path)
        assert end.value.code == 3
        assert f"option {option} is" in one_error(capsys.readouterr())


def test_fairseqs_eval_reads_values_and_runs_nothing(canary):
    import fairseq.models.wav2vec.wav2vec2 as model
    import fairseq.optim.adam as adam
    import fairseq.utils as utils

    assert utils.eval_str_list("20,60", type=int) == [20, 60]
    assert utils.eval_bool("True") is True
    assert utils.eval_bool(None) is False
    assert adam.eval("(0.9, 0.98)") == (0.9, 0.98)
    assert model.eval("[(512, 10, 5)] + [(512, 3, 2)] * 4") == [(512, 10, 5)] + [(512, 3, 2)] * 4
    for text in (f"__import__('os').system('touch {canary}')", f"open({str(canary)!r}, 'w')"):
        with refuses("which fairseq would run as code", UserError):
            utils.eval_str_list(text)


@pytest.mark.parametrize(
    "text",
    ["x", "f()", "a.b", "[0][0]", "9**9**9", "[1] * 10**9", "'x' * 10**9", "lambda: 0", "[x for x in ()]", "(", ""],
)
def test_whatever_is_not_a_value_is_no_literal(text):
    with refuses("which fairseq would run as code; give numbers", UserError):
        literal(text)


@pytest.mark.parametrize("wrong", [{"_target_": "os.system"}, {"user_dir": "HERE"}, {"_name": "no_such_model"}])
def test_a_configuration_imports_and_makes_nothing_by_name(lab, runs, canary, wrong):
    """As Hydra would for `_target_`, and fairseq for `user_dir` on its command line."""
    module = canary.parent / f"{canary.name}_module"
    module.mkdir()
    (module / "__init__.py").write_text(f"open({str(canary)!r}, 'w')")
    state = state_of(runs.stock("plain").path)
    wrong = {key: str(module) if value == "HERE" else value for key, value in wrong.items()}
    sections = {name: {**state["cfg"][name], **wrong} for name in ("common", "model", "task")}
    path = lab.checkpoint({**state, "cfg": {**state["cfg"], **sections}})
    for way in (lab.eval_lm, lab.validate, lambda path: main(["plan", "--path", str(path), "--plan", lab.plan({})])):
        with contextlib.suppress(Exception, SystemExit):  # fairseq's own words for a name that is not registered
            way(path)
