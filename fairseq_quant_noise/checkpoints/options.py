"""Read fairseq's configuration, old or new, from a checkpoint, and select what a packed file keeps of it."""

import json
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..layers.registry import weights_in
from ..networks.efficientnet import seen_in_weights
from ..networks.registry import MODELS, OF_IMAGES, PADDING, PREFIX, stock_name

_SIDE = r"(decoder|encoder|encoder\.sentence_encoder)"  # the modules that embed words

_PREDICTS = r"(decoder|encoder\.sentence_encoder)"  # the side whose words are predicted

#: What a packed file keeps of fairseq's configuration: enough to evaluate. Paths of the machine that trained it go.
_SECTIONS = ("model", "task", "criterion")

#: Options of other sections that a criterion's defaults refer to, as ${optimization.sentence_avg}.
_REFERRED = {"optimization": ("sentence_avg",), "distributed_training": ("ddp_backend",), "common": ("tpu",)}

SECTIONS = (*_SECTIONS, *_REFERRED)  # the sections that a packed file's configuration keeps

#: Keys of a flat (pre-Hydra) configuration that name other components; fairseq would take them for the model's.
_PARTS = ("task", "criterion", "optimizer", "lr_scheduler", "bpe", "tokenizer", "scoring", "simul_type")

#: A criterion's options in fairseq, with defaults: a flat configuration mixes them with others, which fairseq refuses.
_CRITERIA: dict[str, dict[str, Any]] = {
    "cross_entropy": {"sentence_avg": False},
    "adaptive_loss": {"sentence_avg": False, "ddp_backend": "legacy_ddp"},
    "masked_lm": {"tpu": False},
    "label_smoothed_cross_entropy": {
        "label_smoothing": 0.0,
        "ignore_prefix_size": 0,
        **dict.fromkeys(("report_accuracy", "sentence_avg"), False),
    },
    "sentence_prediction": {
        "classification_head_name": "sentence_classification_head",
        **dict.fromkeys(("regression_target", "report_mcc", "report_acc_and_f1", "report_pearson_and_spearman"), False),
    },
}

SHARED = ("classification_head_name", "regression_target")  # options of `ipq` that it passes to the wrapped criterion

#: fairseq's options that say how much noise a training has.
NOISE_FLAGS = ("quant_noise_pq", "quant_noise_scalar")

LEARN = "learn_layerdrop"  # the option by which keep rates of layers are learned
STRUCTURE_OPTIONS = ("share_layers", "share_from", LEARN)  # only this package has them

FAIRSEQ_NOISE_OPTIONS = (*NOISE_FLAGS, "quant_noise_pq_block_size")

#: Values of them with which fairseq builds the layer after the embedding; the noise is too rare to matter.
EMBEDDING_LAYER = {"quant_noise_pq": 1e-8, "quant_noise_pq_block_size": 1}

_PATHS = ("data", "plasma_path", "encoder_embed_path", "decoder_embed_path")

_MACHINE = {**dict.fromkeys(_PATHS, ""), "timm_weights": None, "save_predictions": None}  # none of it goes into a file

_ALONE = {"seed": 1, "distributed_world_size": 1}  # options of other sections that some tasks read


def packed_config(path: str | Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """How to build the checkpoint's network, as a packed file records it.

    Raises:
        UserError: the checkpoint has no configuration, or no embedding that tells its vocabulary.
    """
    cfg = _configuration(path, state)
    kept = {name: dict(cfg[name]) for name in _SECTIONS if isinstance(cfg.get(name), Mapping)}
    model = kept["model"]
    stock = stock_name(path, str(model.get("_name") or model.get("arch")))
    architecture = PREFIX + stock
    model["_name"] = architecture
    model.update({name: 0 for name in NOISE_FLAGS if model.get(name)})  # the file is evaluated, not trained
    model.update(task_options(state["model"]))
    model["quant_noise_embedding_layer"] = find_embedding_layer(state["model"]) is not None
    if "criterion" in kept:
        kept["criterion"] = unwrapped(kept["criterion"])
    for referred, names in _REFERRED.items():
        section = cfg.get(referred)
        kept[referred] = {k: section[k] for k in names if k in section} if isinstance(section, Mapping) else {}
    for section in kept.values():
        section.update({k: v for k, v in _MACHINE.items() if k in section})
    if stock in OF_IMAGES:
        classes = (state.get("task_state") or {}).get("classes")
        return {"architecture": architecture, "cfg": kept, "classes": classes, "vocab_size": 0, "padding_idx": PADDING}
    vocab = vocabulary_size(state["model"])
    if vocab is None:
        raise UserError(f"checkpoint {path}: has no embed_tokens of a {' or '.join(MODELS)}; only these can be packed")
    return {"architecture": architecture, "cfg": kept, "vocab_size": vocab, "padding_idx": PADDING}


def _configuration(path: str | Path, state: Mapping[str, Any]) -> Mapping[str, Any]:
    cfg = state.get("cfg")
    if isinstance(cfg, Mapping) and cfg.get("model") is not None:
        return {**cfg, **{name: _options(cfg, name) for name in _SECTIONS if isinstance(cfg.get(name), Namespace)}}
    args = state.get("args")
    if args is None:
        raise UserError(
            f"checkpoint {path}: holds no configuration ('cfg' or 'args'); give one that fairseq-train wrote"
        )
    options, chosen = _plain(args), vars(args)
    defaults = _CRITERIA.get(str(chosen.get("criterion")), options)
    return {
        "model": options | {"_name": chosen.get("arch")},
        "task": options | {"_name": chosen.get("task")},
        "criterion": {k: options.get(k, v) for k, v in defaults.items()} | {"_name": chosen.get("criterion")},
    }


def _options(cfg: Mapping[str, Any], section: str) -> dict[str, Any]:
    """The options of a section that fairseq builds without a dataclass, such as the model `roberta`.

    Such a section holds the options of the whole command line; those of other sections are left out. A task or
    criterion reads `dataset` and `generation` too, and keeps its own name, which marks it as one without a dataclass.
    """
    apart = ("model", "task") if section == "model" else (*_SECTIONS, "dataset", "generation")
    other = [part for key, part in cfg.items() if key not in apart and isinstance(part, Mapping)]
    elsewhere = {name for part in other for name in part} - {"_name"}
    own = {} if section == "model" else {section: getattr(cfg[section], section, None), **_ALONE}
    return {name: value for name, value in _plain(cfg[section]).items() if name not in elsewhere} | own


def _plain(args: Namespace) -> dict[str, Any]:
    """The options whose values JSON can hold; tuples become lists."""
    options = {name: value for name, value in vars(args).items() if name not in _PARTS}
    return {name: _as_json(value) for name, value in options.items() if _is_json(value)}


def _is_json(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return isinstance(value, str | int | float | bool | type(None))


def _as_json(value: object) -> object:
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value


def as_fairseq(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A packed file's configuration as in fairseq's checkpoints: sections without a dataclass become Namespaces."""
    parts = dict(cfg)
    for section, options in cfg.items():
        if isinstance(options.get(section), str):
            parts[section] = Namespace()
            vars(parts[section]).update(options, **{k: v for k, v in _MACHINE.items() if k in options})
    return parts


def unwrapped(criterion: Mapping[str, Any]) -> dict[str, Any]:
    """A criterion's configuration; for `ipq` that of the criterion it wraps, which is all that evaluation needs."""
    if criterion.get("_name") != "ipq":
        return dict(criterion)
    name = criterion["ipq_criterion"]
    options = {key: criterion[key] for key in SHARED if key in criterion and key in _CRITERIA.get(name, ())}
    return {**options, **json.loads(criterion.get("ipq_criterion_options") or "{}"), "_name": name}


def default_criterion(name: str) -> dict[str, Any]:
    """The configuration of one of fairseq's criterions, with its defaults."""
    return {**_CRITERIA[name], "_name": name}


def vocabulary_size(state: Mapping[str, Tensor]) -> int | None:
    """Number of words in a model's (target) embedding, the sum of the rows W of its (W, D) bands; None without one."""
    embedding = rf"{_PREDICTS}\.embed_tokens\.(embeddings\.\d+\.0\.)?weight"
    return sum(rows for _, rows in _rows(state, embedding)) or None


def task_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read from the weights those options that the task sets or pruning has changed; empty for a language model.

    Args:
        state: the model's weights, dense or quantized. Only numbers of rows count: of embeddings (words, C), learned
            positions (positions, C), and the layers of classification heads (inner width, C) and (classes, inner
            width).

    Returns:
        For a RoBERTa max_positions, the most tokens of a row, and classification_heads, by name [inner width, classes];
        for a `transformer` source_vocab_size; for an EfficientNet num_classes and the blocks of each stage.
    """
    if "conv_stem.weight" in weights_in(state):
        return seen_in_weights(state)
    source = [rows for _, rows in _rows(state, r"encoder\.embed_tokens\.weight")]
    if source:
        return {"source_vocab_size": source[0]}
    positions = [rows for _, rows in _rows(state, r"encoder\.sentence_encoder\.embed_positions\.weight")]
    heads: dict[str, list[int]] = {}
    for part in ("dense", "out_proj"):
        for found, rows in _rows(state, rf"classification_heads\.(.+)\.{part}\.weight"):
            heads.setdefault(found[1], []).append(rows)
    whole = {name: sizes for name, sizes in heads.items() if len(sizes) == 2}
    return {"max_positions": positions[0] - PADDING - 1, "classification_heads": whole} if positions else {}


def find_embedding_layer(state: Mapping[str, Tensor]) -> str | None:
    """The name of the (C, C) weight after the embedding, a layer that stock fairseq adds with noise; None without."""
    found = (re.fullmatch(rf"({_SIDE}\.quant_noise\.weight)(\..+)?", key) for key in state)
    return next((match[1] for match in found if match), None)


def _rows(state: Mapping[str, Tensor], name: str) -> Iterator[tuple[re.Match[str], int]]:
    """For each weight whose name matches, dense or quantized: the match and its number of rows."""
    for key, weight in weights_in(state).items():
        found = re.fullmatch(name, key)
        if found:
            yield found, weight.shape[0]
