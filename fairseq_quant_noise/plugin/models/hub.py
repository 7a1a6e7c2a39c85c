"""Implement `from_pretrained`: fairseq's interface to a RoBERTa, over this package's model.

fairseq builds the class that a checkpoint names, so that a published one would come without noise and plans; it also
reads no packed file, and of a classifier's folder it wants the dictionary in `input0` alone.
"""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils, file_utils
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf, merge_with_parent
from fairseq.models import ARCH_CONFIG_REGISTRY
from fairseq.models.roberta import RobertaHubInterface
from fairseq.models.roberta.model import base_architecture
from fairseq.tasks.sentence_prediction import SentencePredictionConfig, SentencePredictionTask
from omegaconf import DictConfig, OmegaConf, open_dict

from ...checkpoints.options import find_embedding_layer
from ...errors import UserError
from ...networks.registry import PREFIX, stock_name
from ..loading import load_state

_SENTENCES = "sentence_prediction"
_BPE_FILES = {"gpt2_encoder_json": "encoder.json", "gpt2_vocab_bpe": "vocab.bpe"}


def hub_interface(
    model: str | Path, checkpoint_file: str, data: str | Path, bpe: str | None, overrides: dict[str, Any]
) -> RobertaHubInterface:
    """Do the work of `QuantNoiseRoberta.from_pretrained`; `model` is a folder or an address.

    Raises:
        UserError: a folder, file or dictionary does not exist, or the checkpoint is of another model.
        DamagedFileError: the file is not whole, or is refused (see `safe_load`).
    """
    folder = _folder(model)
    words = Path(os.path.abspath(folder / data)) if str(data).startswith(".") else _folder(data)
    settings = {**_bpe_files(folder), **overrides, "bpe": bpe, "data": str(words), "load_checkpoint_heads": True}
    path = folder / checkpoint_file
    state = load_state(path, settings)
    cfg = state["cfg"] if state.get("args") is None else convert_namespace_to_omegaconf(_renamed(path, state["args"]))
    if cfg is None or cfg.get("model") is None:
        raise UserError(f"checkpoint {path}: holds no configuration of a model; give one that fairseq-train wrote")
    with open_dict(cfg):
        options = _renamed(path, cfg.model)
        options.load_checkpoint_heads = True
        options.quant_noise_embedding_layer = find_embedding_layer(state["model"]) is not None
    state |= {"args": None, "cfg": cfg}
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], task=_task(cfg, words), state=state)
    return RobertaHubInterface(cfg, task, models[0])


def _folder(name: str | Path) -> Path:
    if os.path.isfile(name):  # fairseq would unpack it in its own place, and remove it
        raise UserError(f"{name}: is a file; unpack it and give the folder, with checkpoint_file for the file in it")
    found = file_utils.load_archive_file(str(name))
    if found is None:
        raise UserError(f"{name}: no such folder; give the one that holds the checkpoint")
    return Path(found)


def _bpe_files(folder: Path) -> dict[str, str]:
    return {option: str(folder / name) for option, name in _BPE_FILES.items() if (folder / name).is_file()}


def _renamed(path: Path, options: Any) -> Any:
    """Rename a model's options to this package's model, and add those that an older fairseq did not have."""
    architecture = str(getattr(options, "arch", None) or getattr(options, "_name", None))
    model = PREFIX + stock_name(path, architecture)
    with open_dict(options) if isinstance(options, DictConfig) else nullcontext():
        ARCH_CONFIG_REGISTRY.get(architecture, base_architecture)(options)
        options.arch = options._name = model
    return options


def _task(cfg: DictConfig, data: Path) -> SentencePredictionTask | None:
    """Find the task whose dictionary lies beside the model; None for one that fairseq sets up by itself."""
    labels, words = data / "label" / "dict.txt", data / "dict.txt"
    if cfg.task._name == _SENTENCES and (data / "input0" / "dict.txt").is_file() and labels.is_file():
        return None
    if not words.is_file():
        raise UserError(f"{words}: no such file; give the folder of the dictionary as data_name_or_path")
    if cfg.task._name != _SENTENCES:
        return None
    options = cfg.task if OmegaConf.is_config(cfg.task) else OmegaConf.create(vars(cfg.task))
    load = SentencePredictionTask.load_dictionary
    options = merge_with_parent(SentencePredictionConfig(), options, remove_missing=True)
    return SentencePredictionTask(options, load(str(words)), load(str(labels)) if labels.is_file() else Dictionary())
