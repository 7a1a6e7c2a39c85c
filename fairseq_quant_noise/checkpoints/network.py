"""A checkpoint that fairseq wrote, as a network: its configuration, its weights, its words. Needs no fairseq.

What the packed file records of a checkpoint, and the names under which the stock models go, are decided here.
"""

import json
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers import adopt_quantized
from ..layers.pq import CODES
from ..networks import build
from ..networks.efficientnet import our_names, seen_in_weights
from ..quantization.importance import moments_in, sound
from ..weights.discovery import load_without_copy
from .old_names import modern_names
from .safe_load import safe_load

PREFIX = "quant_noise_"  # of this package's names for fairseq's models
#: fairseq's names of the models that this package knows; a name that begins another comes after it.
MODELS = ("transformer_lm", "roberta", "transformer", "efficientnet")
OF_IMAGES = ("efficientnet",)  # those of them that fairseq does not have, and that have no words
STAGES = "quant_noise_stages"  # in a checkpoint's extra_state: the stages done
IMPORTANCE = "quant_noise_importance"  # beside it: of the weights that are dense, where the optimizer cannot tell it

PADDING = 1  # fairseq's index of the padding word
_SIDE = r"(decoder|encoder|encoder\.sentence_encoder)"  # that embeds words
_PREDICTS = r"(decoder|encoder\.sentence_encoder)"  # the side whose words are predicted

#: What a packed file keeps of fairseq's configuration: enough to evaluate. Paths of the machine that trained it go.
_SECTIONS = ("model", "task", "criterion")
#: Options of other sections that a criterion's defaults refer to, as ${optimization.sentence_avg}.
_REFERRED = {"optimization": ("sentence_avg",), "distributed_training": ("ddp_backend",), "common": ("tpu",)}
SECTIONS = (*_SECTIONS, *_REFERRED)  # of a packed file's configuration
#: What a flat configuration says of other parts; fairseq would take their names for options of the model.
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
SHARED = ("classification_head_name", "regression_target")  # options of `ipq` that it hands on
#: fairseq's options that say how much noise a training has.
NOISE_FLAGS = ("quant_noise_pq", "quant_noise_scalar")
STRUCTURE_OPTIONS = ("share_layers", "share_from")  # of this package alone
FAIRSEQ_NOISE_OPTIONS = (*NOISE_FLAGS, "quant_noise_pq_block_size")
#: Values of them with which fairseq builds the layer after the embedding; the noise is too rare to matter.
EMBEDDING_LAYER = {"quant_noise_pq": 1e-8, "quant_noise_pq_block_size": 1}
_PATHS = ("data", "plasma_path", "encoder_embed_path", "decoder_embed_path")
_MACHINE = {**dict.fromkeys(_PATHS, ""), "timm_weights": None, "save_predictions": None}  # none of it goes into a file
_ALONE = {"seed": 1, "distributed_world_size": 1}  # of other sections, for tasks that look into them


@dataclass
class Trained:
    """A checkpoint's content."""

    state: dict[str, Any]  # as fairseq wrote it, but for the names of old weights
    model: nn.Module  # in plain PyTorch, under fairseq's names, with its weights; eval mode
    config: dict[str, Any]  # what a packed file records (`Manifest.model`)
    importance: dict[str, Tensor] = field(default_factory=dict)  # see `importance_in`, where it was asked for


def load_trained(path: str | Path) -> Trained:
    """The network of a fairseq checkpoint, dense or with quantized weights.

    Raises:
        UserError: not a checkpoint, an unsafe one, or of a network that is not implemented without fairseq.
    """
    return as_trained(path, read_checkpoint(path))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint as `safe_load` reads it, its weights under the names of fairseq 0.12, or of our EfficientNet."""
    state = safe_load(path)
    state["model"] = our_names(modern_names(state["model"]))
    return state


def as_trained(path: str | Path, state: dict[str, Any]) -> Trained:
    """`load_trained` of a checkpoint that has been read; `path` is for messages."""
    config = packed_config(path, state)
    model = _bare_network(config)
    weights: dict[str, Tensor] = state["model"]
    adopt_quantized(model, weights)
    _check_finite(path, weights)
    try:
        load_without_copy(model, weights)
    except RuntimeError as error:
        raise UserError(f"checkpoint {path}: does not fit its own configuration ({_first_line(error)})") from None
    return Trained(state, model.eval(), config)


def _bare_network(config: Mapping[str, Any]) -> nn.Module:
    return meta_model(config["architecture"], config["cfg"]["model"], config["vocab_size"], config["padding_idx"])


def importance_in(path: str | Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Adam's second moments in a checkpoint that has been read, by the name of the weight; empty where it has none.

    Those that pruning, sharing or a stage left in it, or else those of its optimizer, if its network is known here.
    """
    found: object = (state.get("extra_state") or {}).get(IMPORTANCE)
    if found is None:
        try:
            network = _bare_network(packed_config(path, state))
            adopt_quantized(network, state["model"])
            found = moments_in(state, network)
        except UserError:
            return {}
    return sound(found, state["model"])


def _check_finite(path: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Refuse what no quantization and no pruning makes good. Raises UserError, naming the tensor."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"checkpoint {path}: {name} holds NaN or infinity; give a checkpoint from before the training diverged"
            )


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
    """The options of a part without a dataclass, as fairseq's model `roberta`: it has those of the whole command line.

    A task or criterion looks into those of other sections too; its own name in it tells that it has no dataclass.
    """
    apart = ("model", "task") if section == "model" else (*_SECTIONS, "dataset", "generation")
    other = [part for key, part in cfg.items() if key not in apart and isinstance(part, Mapping)]
    elsewhere = {name for part in other for name in part} - {"_name"}
    own = {} if section == "model" else {section: getattr(cfg[section], section, None), **_ALONE}
    return {name: value for name, value in _plain(cfg[section]).items() if name not in elsewhere} | own


def _plain(args: Namespace) -> dict[str, Any]:
    """The options that are values of JSON, tuples as lists."""
    options = {name: value for name, value in vars(args).items() if name not in _PARTS}
    return {name: _as_json(value) for name, value in options.items() if _is_json(value)}


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return isinstance(value, str | int | float | bool | type(None))


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value


def as_fairseq(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A packed file's configuration as fairseq's checkpoints hold it: a part without a dataclass is a Namespace."""
    parts = dict(cfg)
    for section, options in cfg.items():
        if isinstance(options.get(section), str):
            parts[section] = Namespace()
            vars(parts[section]).update(options, **{k: v for k, v in _MACHINE.items() if k in options})
    return parts


def unwrapped(criterion: Mapping[str, Any]) -> dict[str, Any]:
    """A criterion's configuration; of `ipq` the one it wraps, for evaluation needs neither its teacher nor its name."""
    if criterion.get("_name") != "ipq":
        return dict(criterion)
    name = criterion["ipq_criterion"]
    options = {key: criterion[key] for key in SHARED if key in criterion and key in _CRITERIA.get(name, ())}
    return {**options, **json.loads(criterion.get("ipq_criterion_options") or "{}"), "_name": name}


def stock_name(path: str | Path, name: str) -> str:
    """fairseq's own name of the model behind a model's or an architecture's name.

    A checkpoint's configuration holds every option, so that the architecture, which only sets defaults, can go.

    Raises:
        UserError: a model that this package does not know.
    """
    bare = name.removeprefix(PREFIX)
    for model in MODELS:
        if bare == model or bare.startswith(f"{model}_"):
            return model
    raise UserError(f"{path}: model {name!r} cannot be compressed here; known models: {', '.join(MODELS)}")


def has_words(architecture: str) -> bool:
    """Whether a network of this architecture depends on a dictionary."""
    bare = architecture.removeprefix(PREFIX)
    return not any(bare == model or bare.startswith(f"{model}_") for model in OF_IMAGES)


def vocabulary_size(state: Mapping[str, Tensor]) -> int | None:
    """How many words the embedding of a model (of its target) holds, adaptive bands added up; None without one."""
    embedding = rf"{_PREDICTS}\.embed_tokens\.(embeddings\.\d+\.0\.)?weight"
    return sum(rows for _, rows in _rows(state, embedding)) or None


def task_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the weights say of options that the task decides, or pruning has changed; nothing for a language model.

    Returns:
        Of a RoBERTa max_positions, the most tokens of a row, and classification_heads, by name [inner width, classes];
        of a `transformer` source_vocab_size; of an EfficientNet num_classes and the blocks of each stage.
    """
    if "conv_stem.weight" in state or f"conv_stem.weight.{CODES}" in state:
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
    """The weight of the C x C layer after the embedding, which stock fairseq adds with its noise; None without one."""
    found = (re.fullmatch(rf"({_SIDE}\.quant_noise\.weight)(\..+)?", key) for key in state)
    return next((match[1] for match in found if match), None)


def _rows(state: Mapping[str, Tensor], name: str) -> Iterator[tuple[re.Match[str], int]]:
    """For each weight whose name matches, dense or in codes: the match and its number of rows."""
    for key, tensor in state.items():
        found = re.fullmatch(rf"{name}(?:\.{CODES})?", key)
        if found:
            yield found, tensor.shape[0]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else lines[0]


def meta_model(architecture: str, options: Mapping[str, Any], vocab_size: int, padding_idx: int = PADDING) -> nn.Module:
    """The network of an architecture without memory for its weights, for sizes.

    Raises:
        UserError: the options do not make a network.
    """
    try:
        with torch.device("meta"):
            return build(architecture, options, vocab_size, padding_idx)
    except UserError:
        raise
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{architecture}: these options make no network ({error}); change one of them") from None
