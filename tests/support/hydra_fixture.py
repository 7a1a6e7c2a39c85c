"""fairseq-hydra-train in this process, with the configurations in configs/: composed by Hydra, made tiny, trained."""

import contextlib
import copy
import functools
import logging
from pathlib import Path
from unittest import mock

import fairseq.distributed.utils
import fairseq_cli.hydra_train
import fairseq_cli.train
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models import MODEL_DATACLASS_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from hydra.core.global_hydra import GlobalHydra
from lm_fixture import Run, forgetful_fairseq, recorded
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
#: Folders of configs/ that are groups, and hold no training of their own.
GROUPS = ("model", "noise", "share", "prune", "ipq", "run_config")
#: Every training: TASK/NAME, as --config-name wants it.
NAMES = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in CONFIGS.glob("*/*.yaml")
    if path.parent.name not in (*GROUPS, "plans")
)
SECTIONS = tuple(FairseqConfig.__dataclass_fields__)
QUIET = ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null"]
#: What makes a network and its batches tiny, by the ending of a key.
TINY = {
    "_layers": 2,
    "_embed_dim": 128,
    "_input_dim": 128,
    "_output_dim": 128,
    "_attention_heads": 4,
    "_cutoff": "20,60",
    "tokens_per_sample": 32,
    "max_positions": 32,
    "max_tokens": 256,
    "num_workers": 0,
    "fp16": False,
    "amp": False,
    "image_size": 32,
    "depth": 0.1,
    "max_update": 1,
}


@functools.cache
def composed(name: str, *keys: str) -> DictConfig:
    """What fairseq-hydra-train --config-name NAME KEYS hands to the training, resolved; nothing is trained.

    Leave what it returns unchanged: a configuration is composed once.
    """
    found: list[DictConfig] = []
    dense = ("checkpoint.finetune_from_model=DENSE",) if name.endswith("_ipq") else ()
    keys = ("task.data=DATA", "common.user_dir=PLUGIN", *dense, *keys)
    command = ["fairseq-hydra-train", "--config-dir", str(CONFIGS), "--config-name", name, *QUIET, *keys]
    GlobalHydra.instance().clear()
    with (
        _without_debugging(),
        mock.patch("sys.argv", command),
        mock.patch("fairseq.distributed.utils.call_main", lambda cfg, main: found.append(cfg)),
    ):
        fairseq_cli.hydra_train.cli_main()
    return found[0]


@contextlib.contextmanager
def _without_debugging():
    """Hydra composes the configuration three times more to describe it where somebody logs at that level."""
    before = logging.root.manager.disable
    logging.disable(logging.DEBUG)
    try:
        yield
    finally:
        logging.disable(before)


def dataclass_of(section: str, node: DictConfig) -> DictConfig | None:
    """The keys, types and defaults that fairseq and this package declare for a section; None where there is no one."""
    declared = FairseqConfig.__dataclass_fields__[section].default
    name = node.get("_name")
    if section == "model":
        declared = MODEL_DATACLASS_REGISTRY.get(name)
    elif section == "task":
        declared = TASK_DATACLASS_REGISTRY.get(name)
    elif section in REGISTRIES:
        declared = REGISTRIES[section]["dataclass_registry"].get(name)
    return None if declared is None else OmegaConf.structured(declared)


def filled(cfg: DictConfig) -> dict:
    """The configuration with the dataclasses' defaults, as nested dicts.

    Raises:
        omegaconf.errors.OmegaConfBaseException: a key that its dataclass has not, or a value of the wrong type.
    """
    sections = {name: node for name, node in cfg.items() if name in SECTIONS and isinstance(node, DictConfig)}
    declared = {name: dataclass_of(name, node) for name, node in sections.items()}
    whole = OmegaConf.create({name: node for name, node in declared.items() if node is not None})
    return OmegaConf.to_container(OmegaConf.merge(whole, OmegaConf.create(sections)), resolve=True, enum_to_str=True)


def made_tiny(cfg: DictConfig, data: Path) -> DictConfig:
    """The same configuration for a network of seconds, one update on a CPU, on this data."""
    cfg = copy.deepcopy(cfg)
    cfg.task.data, cfg.common.user_dir = str(data), None  # the plugin is here already
    for section in ("common", "model", "task", "dataset", "optimization"):
        for key in list(cfg[section]):
            for ending, value in TINY.items():
                now = cfg[section][key]
                if key.endswith(ending) and now is not None and (isinstance(now, str | bool) or now > value):
                    cfg[section][key] = value
    cfg.common.cpu = True
    return cfg


def train(cfg: DictConfig, folder: Path) -> Run:
    """Train as fairseq-hydra-train does once it has its configuration."""
    cfg.checkpoint.save_dir = str(folder)
    with forgetful_fairseq(), recorded(folder) as runs:
        fairseq.distributed.utils.call_main(cfg, fairseq_cli.train.main)
    return runs[-1]
