"""fairseq-hydra-train with the configurations in configs/: every one is loaded, checked key by key, and trained."""

import functools
import re

import pytest
from fairseq.models import MODEL_DATACLASS_REGISTRY
from hydra_fixture import CONFIGS, NAMES, ROOT, composed, filled, made_tiny, train
from lm_fixture import USER_DIR, state_of
from omegaconf import OmegaConf
from roberta_fixture import MASKED, SENTENCES, roberta  # noqa: F401
from toys import python
from translation_fixture import WORDS, write_pairs
from vision_fixture import write_images

from fairseq_quant_noise.plugin.criterions.ipq import IPQCriterionConfig

WRITTEN = sorted(p for p in CONFIGS.rglob("*.yaml") if "plans" not in p.parts)
LM = "language_modeling"
PRETRAINED = {f"{SENTENCES}/mnli_{size}": f"{MASKED}/roberta_{size}" for size in ("base", "small")}


@functools.cache
def data_of(task, lab):
    """A folder with data for this task."""
    if task in (MASKED, SENTENCES):
        return lab.of(task)
    if task == LM:
        return lab.data
    if task == "translation":
        write_pairs(lab.folder / task, WORDS)
        return lab.folder / task
    if task == "image_classification":
        write_images(lab.folder / task)
        return lab.folder / task
    pytest.fail(f"give the tests data for the task {task}, in data_of")


@functools.cache
def trained(name, lab):
    """One update of a configuration, from the training before it: iPQ from the dense one, MNLI from masked words."""
    cfg = made_tiny(composed(name), data_of(name.partition("/")[0], lab))
    before = name.removesuffix("_ipq") if name.endswith("_ipq") else PRETRAINED.get(name)
    if before:
        cfg.checkpoint.finetune_from_model = str(trained(before, lab).path)
    cfg.dataset.disable_validation = True
    return train(cfg, lab.new("hydra"))


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_key_of_a_configuration_has_a_comment(path):
    lines = path.read_text().splitlines()
    bare = [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if re.match(r"\s*(- )?[\w/]+( [\w/@]+)?:|\s*- ", line)
        and "# " not in line
        and not before.strip().startswith("# ")
    ]
    assert bare == []
    assert lines[0].startswith("# @package")


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_a_training_is_one_of_the_dataclasses(name):
    whole = filled(composed(name))
    assert whole["model"]["_name"].startswith("quant_noise_")
    assert whole["task"]["data"] == "DATA"
    plan = whole["common"]["quantization_config_path"]
    assert (whole["criterion"]["_name"] == "ipq") == name.endswith("_ipq") == (plan is not None)
    assert plan is None or plan.startswith(str(CONFIGS / "plans"))


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_trains(name, roberta):  # noqa: F811
    run = trained(name, roberta)
    state = state_of(run.path)
    assert run.updates[-1]["num_updates"] == 1
    codes = [key for key in state["model"] if key.endswith(".codes")]
    assert bool(codes) == name.endswith("_ipq")
    heads = [key for key in state["model"] if key.startswith("classification_heads.mnli.")]
    assert bool(heads) == name.startswith(SENTENCES)
    if codes:
        assert state["extra_state"]["quant_noise_stages"]["done"] == 3


@pytest.mark.parametrize("group", ["noise", "share", "prune"])
def test_every_choice_of_noise_sharing_and_pruning_has_keys_of_the_networks(group):
    names = ("transformer_lm", "roberta", "transformer")
    networks = [MODEL_DATACLASS_REGISTRY[f"quant_noise_{name}"] for name in names]
    for path in (CONFIGS / group).glob("*.yaml"):
        keys = set(OmegaConf.load(path))
        assert any(keys <= network.__dataclass_fields__.keys() for network in networks), path
        assert "# @package model" in path.read_text() or not keys, path


@pytest.mark.parametrize(
    "plan", [path.stem for path in (CONFIGS / "ipq").glob("*.yaml") if not path.stem.startswith("none")]
)
def test_every_choice_of_stages_names_a_plan_that_is_there(plan):
    options = OmegaConf.load(CONFIGS / "ipq" / f"{plan}.yaml")
    path = OmegaConf.to_container(options)["common"]["quantization_config_path"]
    assert path == f"${{hydra:runtime.config_sources.2.path}}/plans/{plan}.yaml"  # of --config-dir
    assert (CONFIGS / "plans" / f"{plan}.yaml").exists()
    assert options.criterion.keys() <= IPQCriterionConfig.__dataclass_fields__.keys() | {"_name"}


def test_groups_chosen_on_the_command_line_are_what_trains(lab):
    """Noise, sharing, pruning and stages in one command, from the dense network of another."""
    dense = lab.train("--decoder-layers", 4, "--decoder-layerdrop", 0.2, arch="quant_noise_transformer_lm")
    folder = lab.new("hydra")
    keys = [f"task.data={lab.data}", f"common.user_dir={USER_DIR}", "common.cpu=true", "optimization.max_update=3"]
    keys += [f"checkpoint.save_dir={folder}", f"checkpoint.finetune_from_model={dense.path}"]
    keys += ["noise=int8", "share=pairs_mean", "prune=decoder", "dataset.disable_validation=true"]
    keys += [f"model.decoder_{key}" for key in ("embed_dim=32", "input_dim=32", "output_dim=32", "ffn_embed_dim=64")]
    config = ["--config-dir", ROOT / "configs", "--config-name", f"{LM}/small_ipq"]
    done = python("-m", "fairseq_cli.hydra_train", *config, *keys, cwd=folder.parent, fresh=False)
    assert done.returncode == 0, done.stderr[-2000:]
    state = state_of(folder / "checkpoint_last.pt")
    model = state["cfg"]["model"]
    assert model["quant_noise_kind"] == "int8"
    assert (model["decoder_layers"], model["share_layers"], model["decoder_layerdrop"]) == (2, 2, 0)
    assert state["extra_state"]["quant_noise_stages"]["done"] == 3
    assert "distortion_self_attn_weight" in done.stdout + done.stderr  # fc1 is in codes by then
    assert (folder / ".hydra" / "overrides.yaml").exists()
