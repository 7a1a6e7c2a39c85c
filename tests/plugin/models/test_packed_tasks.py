"""Tasks and criteria without a dataclass, of which fairseq records the whole command line: a packed file keeps them."""

import argparse
import io
import json
from argparse import Namespace
from unittest import mock

import fairseq.distributed.utils
import fairseq_cli.generate
import fairseq_cli.train
import fairseq_cli.validate
import pytest
from fairseq import options
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY
from lm_fixture import USER_DIR, forgetful_fairseq, split
from translation_fixture import BASE, DIMS, LOSS, PLAN, SHARED, translation, verb  # noqa: F401

from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.checkpoints.options import as_fairseq, packed_config
from fairseq_quant_noise.checkpoints.safe_load import safe_load
from fairseq_quant_noise.plugin.loading import load_state

TASK = split("--task translation_multi_simple_epoch --langs de,en --lang-pairs de-en --encoder-langtok src")
EVALUATION = split("--cpu --num-workers 0 --batch-size 8 --log-format none --user-dir", USER_DIR)


@pytest.fixture(scope="module")
def files(translation):  # noqa: F811
    """A checkpoint of a multilingual task, and its packed file."""
    data, folder, packed = translation.folder / SHARED, translation.new(), translation.new("packed.safetensors")
    common = [flag for flag in BASE if flag not in (*split("--task translation --source-lang de --target-lang en"),)]
    flags = ["--arch", "quant_noise_transformer", "--user-dir", USER_DIR, "--share-all-embeddings", *DIMS, *LOSS]
    parser = options.get_training_parser()
    arguments = [str(data), *common, *flags, *TASK, "--max-update", "3", "--save-dir", str(folder)]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, arguments))
    with forgetful_fairseq():
        fairseq.distributed.utils.call_main(cfg, fairseq_cli.train.main)
    checkpoint = folder / "checkpoint_last.pt"
    verb("quantize", "--path", checkpoint, "--plan", translation.plan(PLAN), "--out", packed)
    return checkpoint, packed


def validation_loss(data, path):
    """What fairseq-validate logs of a model of this file."""
    arguments = [str(data), "--path", str(path), *EVALUATION, *TASK]
    every, given = (
        options.parse_args_and_arch(options.get_validation_parser(), arguments, suppress_defaults=given)
        for given in (False, True)
    )
    logged: dict = {}
    progress = "fairseq.logging.progress_bar.NoopProgressBar.print"
    with forgetful_fairseq(), mock.patch(progress, lambda bar, stats, **_: logged.update(stats)):
        fairseq_cli.validate.main(convert_namespace_to_omegaconf(every), given)
    return float(logged["loss"])


def translations(data, path):
    arguments = [str(data), "--path", str(path), *EVALUATION, *TASK, *split("--gen-subset valid -s de -t en --beam 1")]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_generation_parser(), arguments))
    printed = io.StringIO()
    with forgetful_fairseq(), mock.patch("logging.basicConfig"):
        fairseq_cli.generate._main(cfg, printed)
    return sorted(line.split("\t")[-1] for line in printed.getvalue().splitlines() if line.startswith("H-"))


def test_a_task_without_a_dataclass_translates_and_validates_as_its_checkpoint(translation, files):  # noqa: F811
    _, packed = files
    dense = translation.new("dense.pt")
    verb("to-dense", packed, "--out", dense)
    data = translation.folder / SHARED
    lines = translations(data, packed)
    assert len(lines) == 24
    assert translations(data, dense) == lines
    assert validation_loss(data, packed) == pytest.approx(validation_loss(data, dense), abs=1e-4)


def test_the_file_keeps_its_options_and_nothing_of_the_machine(translation, files):  # noqa: F811
    checkpoint, packed = files
    saved, kept = safe_load(checkpoint)["cfg"]["task"], load_state(packed)["cfg"].task
    assert isinstance(kept, Namespace)
    for name in ("task", "langs", "lang_pairs", "encoder_langtok", "langtoks_specs", "sampling_method"):
        assert getattr(kept, name) == getattr(saved, name)
    text = json.dumps(read(packed).manifest.model)
    assert str(translation.folder) not in text
    assert "save_dir" not in text


def legacy(section):
    """The classes of fairseq's that have no dataclass, by name."""
    registry, known = {
        "task": (TASK_REGISTRY, TASK_DATACLASS_REGISTRY),
        "criterion": (CRITERION_REGISTRY, CRITERION_DATACLASS_REGISTRY),
    }[section]
    return [pytest.param(section, name, registry[name], id=name) for name in sorted(registry.keys() - known.keys())]


@pytest.mark.parametrize(("section", "name", "kind"), [*legacy("task"), *legacy("criterion")])
def test_every_part_without_a_dataclass_is_kept_with_all_its_options(files, section, name, kind):
    state = safe_load(files[0])
    parser = argparse.ArgumentParser(add_help=False)
    kind.add_args(parser)
    options = {action.dest: action.default for action in parser._actions} | {"data": "/secret", "pairs": ("a", ["b"])}
    state["cfg"][section] = Namespace(**options, **{section: name, "_name": name, "save_dir": "/secret"})
    kept = as_fairseq(json.loads(json.dumps(packed_config("x", state)["cfg"])))[section]
    changed = {"data": "", "pairs": ["a", ["b"]]} | (
        {"save_predictions": None} if "save_predictions" in options else {}
    )
    expected = options | changed | {section: name, "_name": name, "seed": 1, "distributed_world_size": 1}
    assert vars(kept) == expected


def test_the_dense_checkpoint_keeps_a_criterion_without_a_dataclass(translation, files):  # noqa: F811
    state, out = safe_load(files[0]), translation.new("dense.pt")
    state["cfg"]["criterion"] = Namespace(criterion="sentence_ranking", _name="sentence_ranking", num_classes=4)
    verb("to-dense", translation.checkpoint(state), "--out", out)
    assert safe_load(out)["cfg"]["criterion"] == state["cfg"]["criterion"]


def test_a_file_cannot_make_fairseq_write_or_change_a_namespace():
    hostile = {"criterion": "sentence_ranking", "save_predictions": "/precious", "__class__": "x"}
    kept = as_fairseq({"criterion": hostile})["criterion"]
    assert kept.save_predictions is None
    assert type(kept) is Namespace
