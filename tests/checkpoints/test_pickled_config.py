"""Configurations that were pickled as omegaconf objects: read as plain containers, and nothing in them runs."""

import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from toys import refuses

from fairseq_quant_noise.checkpoints.safe_load import safe_load
from fairseq_quant_noise.errors import DamagedFileError

pytestmark = pytest.mark.upstream(23)

CONFIG = {
    "task": {"_name": "masked_lm", "data": None, "lr": [0.1, 2, True, "x", b"y"], "seed": "${common.seed}"},
    "common": {"seed": 3, "missing": "???", "none": {}, "chain": "${task.seed}"},
    "shared": {1: "a", "list": [[1], {"x": []}]},
}


@dataclass
class Options:
    """As fairseq's dataclasses: omegaconf pickles the class and the types of its fields."""

    number: int = 1
    words: list[str] = field(default_factory=lambda: ["a"])
    maybe: int | None = None
    mapping: dict[str, Any] = field(default_factory=lambda: {"k": 1})
    either: int | str = "x"
    rate: float = 0.5
    flag: bool = True


Options.__module__ = "fairseq.options_of_another_version"


@pytest.fixture
def of_fairseq(monkeypatch):
    """fairseq as it was when the file was written."""
    module = type(sys)(Options.__module__)
    module.Options = Options
    monkeypatch.setitem(sys.modules, Options.__module__, module)
    return Options


def save(place, zipped=True, **content):
    torch.save({"model": {"w": torch.ones(2)}, **content}, place, _use_new_zipfile_serialization=zipped)
    return place


@pytest.fixture
def place(tmp_path):
    return tmp_path / "checkpoint.pt"


@pytest.mark.parametrize("zipped", [True, False])
def test_it_comes_as_plain_containers_with_references_followed(place, zipped):
    config = OmegaConf.create(CONFIG)
    OmegaConf.set_struct(config, True)
    read = safe_load(save(place, zipped, cfg=config))["cfg"]
    assert read == OmegaConf.to_container(config, resolve=True)
    assert read["common"]["chain"] == 3
    assert {type(read), type(read["task"]), type(read["task"]["lr"])} == {dict, list}


def test_a_namespace_inside_comes_too(place):
    """As fairseq recorded a model that has no dataclass."""
    config = OmegaConf.create({"model": None}, flags={"allow_objects": True})
    with open_dict(config):
        config.model = Namespace(arch="roberta_base", sizes=[1, 2])
    assert safe_load(save(place, cfg=config))["cfg"] == {"model": Namespace(arch="roberta_base", sizes=[1, 2])}


def test_classes_of_fairseq_in_it_are_not_needed(place, of_fairseq, monkeypatch):
    config = OmegaConf.create({"model": OmegaConf.structured(of_fairseq)})
    expected = OmegaConf.to_container(config)
    save(place, cfg=config)
    monkeypatch.delitem(sys.modules, of_fairseq.__module__)
    assert safe_load(place)["cfg"] == expected


def test_omegaconf_is_not_needed(place):
    save(place, cfg=OmegaConf.create(CONFIG))
    script = (
        "import sys; sys.modules['omegaconf'] = None\n"
        "from fairseq_quant_noise.checkpoints.safe_load import safe_load\n"
        f"print(safe_load({str(place)!r})['cfg']['common'])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.stdout.strip() == "{'seed': 3, 'missing': '???', 'none': {}, 'chain': 3}", run.stderr


@pytest.mark.parametrize("number", [np.float64(0.25), np.float32(0.25), np.int64(-7), np.bool_(True)])
def test_numbers_of_numpy_become_pythons(place, number):
    """The best score of a metric that scikit-learn computed is one."""
    best = safe_load(save(place, extra_state={"best": number}))["extra_state"]["best"]
    assert best == number
    assert type(best) in (float, int, bool)


def test_the_meters_of_an_old_checkpoint_are_left_out(place, of_fairseq):
    meters = {"train_meters": {"loss": of_fairseq()}, "valid_meters": {}}
    assert safe_load(save(place, extra_state={"epoch": 3, **meters}))["extra_state"] == {"epoch": 3}


@pytest.mark.parametrize("part", ["args", "cfg", "extra_state", "model", "optimizer_history", "config"])
def test_a_class_of_fairseq_anywhere_else_is_refused_by_its_name(place, of_fairseq, part):
    value = of_fairseq()
    content = {
        "args": {"args": Namespace(x=[value])},
        "cfg": {"cfg": {"task": {"x": of_fairseq}}},
        "config": {"cfg": OmegaConf.create({"x": Namespace(x=value)}, flags={"allow_objects": True})},
        "extra_state": {"extra_state": {"metrics": [(1, value)]}},
        "model": {"model": {"w": value}},
        "optimizer_history": {"optimizer_history": [Namespace(x=value)]},
    }
    with refuses(r"refused, .*fairseq\.options_of_another_version\.Options", DamagedFileError):
        safe_load(save(place, **content[part]))


def hostile_text(text):
    """Where a text can stand that omegaconf or Hydra reads, by name."""
    loose = OmegaConf.create({"task": {"data": "x"}})
    loose.task._get_node("data")._val = text
    whole = OmegaConf.create({"task": {"data": "x"}})
    whole._get_node("task").__dict__["_content"] = text
    return {
        "a node": {"cfg": loose},
        "a section": {"cfg": whole},
        "a plain dict": {"cfg": {"task": {"data": text}}},
        "a list": {"cfg": {"task": {"data": [text]}}},
        "a name": {"cfg": {"task": {text: 1}}},
        "a namespace": {"args": Namespace(data=text)},
        "bytes": {"args": Namespace(data=(text.encode(),))},
    }


@pytest.mark.parametrize("text", ["${oc.env:SECRET}", "a ${x.${oc.env:SECRET}}", "${${a}:\n1}"])
@pytest.mark.parametrize("where", list(hostile_text("")))
def test_a_text_that_would_make_omegaconf_run_a_resolver_is_refused(place, monkeypatch, where, text):
    """With fairseq, the environment of the reader would end in the next checkpoint."""
    monkeypatch.setenv("SECRET", "1234")
    with refuses(
        r"refused, its configuration says \$\{.*:.*which would run when it is read; if you trust it", DamagedFileError
    ):
        safe_load(save(place, **hostile_text(text)[where]))


class Calls:
    """Unpickling it calls `function(*args)`, and then sets its state."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


def endless():
    """A list that is its own only item."""
    config = OmegaConf.create({"x": []})
    config.x.__dict__["_content"] = [config.x]
    return config


def laughs():
    """30 lists, each twice in the next: 2^30 items in memory for 30."""
    nest = ["ha"]
    for _ in range(30):
        nest = [nest, nest]
    return {"x": nest}


HOSTILE = {
    "a class made by type": Calls(type, "X", (), {}),
    "a state that is no dict": Calls(DictConfig, state=[1]),
    "a config without content": Calls(DictConfig, state={"_metadata": None}),
    "a type for a value": {"task": dict},
    "metadata for a value": {"task": OmegaConf.create({})._metadata},
    "a parameter": torch.nn.Parameter(torch.ones(1)),
    "a list": [1],
    "in itself": endless(),
    "too long": laughs(),
    "an unknown number": Calls(np.dtype, "O8", False, True),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_what_is_no_configuration_is_refused_in_one_line(place, name):
    with refuses("checkpoint .*: refused, its |not a whole", DamagedFileError):
        safe_load(save(place, cfg=HOSTILE[name]))


def test_its_classes_do_not_open_the_door_to_others(tmp_path, place):
    """A node whose state is the result of a call."""
    call = Calls(os.system, f"touch {tmp_path / 'marker'}")
    with refuses("refused, its pickle calls for posix.system", DamagedFileError):
        safe_load(save(place, cfg=Calls(DictConfig, state={"_content": {"x": call}})))
    assert not (tmp_path / "marker").exists()


def test_the_classes_themselves_are_never_used(place, monkeypatch):
    """Neither their construction nor their __setstate__, which omegaconf runs on whatever the file says."""
    save(place, cfg=OmegaConf.create(CONFIG))
    for cls in DictConfig.__mro__[:-1]:
        for name in ("__new__", "__init__", "__setstate__"):
            if name in vars(cls) and cls.__module__.startswith("omegaconf"):
                monkeypatch.setattr(cls, name, lambda *_: pytest.fail("omegaconf ran"))
    assert safe_load(place)["cfg"]["common"]["seed"] == 3
