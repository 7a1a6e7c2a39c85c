"""Convert a Hugging Face folder of a RoBERTa, an XLM-R or a BERT to a fairseq checkpoint with its dictionary.

fairseq's RoBERTa computes the same as theirs, with three differences: it has no token types, so that type 0 is
added to the positions; a BERT's positions begin at row 0, not 2; and fairseq's layer norm adds 1e-5 to the variance, so
that another number needs the RoBERTa of this package.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import DamagedFileError, UserError
from ...networks.hugging_face import ACTIVATIONS, OUTPUT, POSITIONS, PREFIXES, TOKEN_TYPES, WORDS, renamed, their_names
from ...networks.registry import PADDING, PREFIX
from ...networks.roberta_config import FAIRSEQ_EPS
from ..checkpoint import Checkpoint
from ..keys import no_training
from .folder import read_config, read_weights
from .vocabulary import read_vocabulary

HEAD = "sentence_classification_head"  # fairseq's default name
_THEIR_EPS = 1e-12  # of a config.json without layer_norm_eps
_FIRST = PADDING + 1  # fairseq's row of the first position
#: Options that change what the network computes, with the values that fairseq's RoBERTa has.
_ONLY = {"position_embedding_type": ("absolute",), "is_decoder": (False,), "add_cross_attention": (False,)}
#: Tensors that no head of fairseq's uses, and what to say of them.
_LEFT_OUT = {
    "pooler.dense.": "the pooler, which only a classifier of the folder would use",
    "cls.seq_relationship.": "the head for the next sentence, which fairseq does not have",
}
_BUFFERS = ("position_ids", "token_type_ids")  # stored by older versions


@dataclass(frozen=True)
class Converted:
    """A fairseq checkpoint, and the files beside it."""

    checkpoint: Checkpoint  # with its configuration
    files: dict[str, bytes]  # by path from the checkpoint's folder: dict.txt, the tokenizer's files, label/dict.txt
    notes: list[str]  # what the user should know of the conversion
    flags: list[str]  # the options of fairseq-train that make this network


def from_folder(path: str | Path) -> Converted:
    """Convert the folder `path`.

    Raises:
        UserError: no such folder, another model than a RoBERTa, XLM-R or BERT, or an option, tensor or token that
            fairseq's RoBERTa has no place for.
        DamagedFileError: a file is damaged.
    """
    folder = Path(path)
    config = read_config(folder)
    try:
        return _converted(folder, config)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DamagedFileError(f"{folder}: its configuration or tokenizer is damaged ({reason})") from None


def _converted(folder: Path, config: Mapping[str, Any]) -> Converted:
    """As `from_folder`; what a damaged file leads to, may be any error."""
    kind = _kind(folder, config)
    theirs = _without_buffers(read_weights(folder), PREFIXES[kind])
    classes = _classes(config, theirs, kind)
    notes = _leave_out(theirs, kind, classes)
    _check_output(folder, config, kind, theirs)
    vocabulary = read_vocabulary(folder, kind, _tensor(folder, theirs, "embeddings.word_embeddings.weight").shape[0])
    weights = _fairseq_weights(folder, config, kind, theirs, classes)
    notes += vocabulary.notes + _add_output(weights)
    order = torch.tensor(vocabulary.order)
    for name in (WORDS, OUTPUT, "encoder.lm_head.bias"):
        weights[name] = weights[name][order]
    tied = torch.equal(weights[OUTPUT], weights[WORDS])
    if tied:
        weights[OUTPUT] = weights[WORDS]
    labels = None if classes is None else _labels(config, classes)
    args = _options(folder, config, kind, weights, labels, tied)
    if args.arch != "roberta":
        notes.append(
            f"its layer norms add {args.layer_norm_eps:g}, not fairseq's {FAIRSEQ_EPS:g}, so that the model is "
            f"{args.arch} (--user-dir); in a training, give --layer-norm-eps {args.layer_norm_eps:g} too"
        )
    state = {"args": args, "model": weights, **no_training(), "last_optimizer_state": None}
    checkpoint = Checkpoint(folder, state)
    checkpoint.network  # noqa: B018 (raises where a shape is wrong)
    files = dict(vocabulary.files)
    if labels is not None and len(labels) > 1:
        files["label/dict.txt"] = "".join(f"{label} 1\n" for label in labels).encode()
    return Converted(checkpoint, files, notes, _flags(args))


def _kind(folder: Path, config: Mapping[str, Any]) -> str:
    """model_type, where fairseq's RoBERTa can be this model. Raises UserError, naming the option."""
    kind = config.get("model_type")
    if kind not in PREFIXES:
        raise UserError(f"{folder}: model_type {kind!r} cannot be converted; only {', '.join(PREFIXES)} can")
    for name, values in _ONLY.items():
        if config.get(name) is not None and config[name] not in values:
            raise UserError(
                f"{folder}: {name} {config[name]!r} cannot be converted; fairseq's RoBERTa has {values[0]!r}"
            )
    if config.get("hidden_act", "gelu") not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"{folder}: hidden_act {config['hidden_act']!r} cannot be converted; only {known} can")
    return str(kind)


def _without_buffers(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights in fp32, without buffers; a network without a head gets the prefix that it has inside one."""
    kept = {name: tensor.float() for name, tensor in weights.items() if name.rpartition(".")[2] not in _BUFFERS}
    bare = not any(name.startswith(prefix) for name in kept)
    return {f"{prefix}{name}" if bare else name: tensor for name, tensor in kept.items()}


def _tensor(folder: Path, theirs: Mapping[str, Tensor], name: str) -> Tensor:
    found = next((tensor for full, tensor in theirs.items() if full.endswith(f".{name}")), None)
    if found is None or found.dim() != 2:
        raise UserError(f"{folder}: has no matrix {name}; give the folder of a RoBERTa or BERT")
    return found


def _classes(config: Mapping[str, Any], theirs: Mapping[str, Tensor], kind: str) -> int | None:
    """Number of classes of the head for sentences; None without one."""
    out = theirs.get("classifier.weight" if kind == "bert" else "classifier.out_proj.weight")
    if out is None or out.dim() != 2:
        return None
    names = config.get("architectures") or ["BertForSequenceClassification"]
    of_sentences = "bert.pooler.dense.weight" in theirs and any("ForSequenceClassification" in str(n) for n in names)
    return out.shape[0] if kind != "bert" or of_sentences else None  # a BERT has the same names in a head for each word


def _leave_out(theirs: dict[str, Tensor], kind: str, classes: int | None) -> list[str]:
    """Take out of `theirs` what no head uses; what to say of it."""
    said = []
    for part, what in _LEFT_OUT.items():
        names = [
            name for name in theirs if part in name and not (kind == "bert" and classes and part == "pooler.dense.")
        ]
        for name in names:
            del theirs[name]
        said += [f"left out {what}: {', '.join(names)}"] if names else []
    for twice in ("lm_head.decoder.bias", "cls.predictions.decoder.bias"):  # the same as the head's bias
        theirs.pop(twice, None)
    return said


def _check_output(folder: Path, config: Mapping[str, Any], kind: str, theirs: Mapping[str, Tensor]) -> None:
    """Refuse a head for words whose nonlinearity is not that of the layers, as fairseq's is. Raises UserError."""
    activation = ACTIVATIONS[config.get("hidden_act", "gelu")]
    if kind != "bert" and "lm_head.dense.weight" in theirs and activation != "gelu":
        raise UserError(
            f"{folder}: lm_head.dense.weight has gelu after it whatever hidden_act is, and fairseq's has the layers' "
            f"{config['hidden_act']}; take that head off first"
        )


def _fairseq_weights(
    folder: Path, config: Mapping[str, Any], kind: str, theirs: dict[str, Tensor], classes: int | None
) -> dict[str, Tensor]:
    """The weights under fairseq's names, words still in their order. Raises UserError, naming a tensor."""
    types = theirs.pop(f"{PREFIXES[kind]}{TOKEN_TYPES}", None)
    layers = _whole(folder, config, "num_hidden_layers")
    if layers > len(theirs):
        raise UserError(f"{folder}: num_hidden_layers in config.json is {layers}, more than it has tensors; correct it")
    names = their_names(layers, kind, PREFIXES[kind], HEAD if classes else None)
    weights, unknown = renamed(theirs, {theirs: ours for ours, theirs in names.items()})
    if unknown:
        more = f", with {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(f"{folder}: {unknown[0]}{more} has no place in fairseq's RoBERTa; take that head off first")
    positions = weights.get(POSITIONS)
    if positions is None or positions.dim() != 2 or len(positions) <= _skipped(folder, config, kind):
        raise UserError(f"{folder}: has no matrix embeddings.position_embeddings.weight; give a whole RoBERTa or BERT")
    weights[POSITIONS] = _positions(positions, _skipped(folder, config, kind), types)
    weights["encoder.sentence_encoder.version"] = torch.tensor([3.0])
    return weights


def _skipped(folder: Path, config: Mapping[str, Any], kind: str) -> int:
    """Rows before that of the first position."""
    padding = {"pad_token_id": PADDING} if config.get("pad_token_id") is None else config
    return 0 if kind == "bert" else _whole(folder, padding, "pad_token_id", 0) + 1


def _positions(theirs: Tensor, skipped: int, types: Tensor | None) -> Tensor:
    """fairseq's rows of positions, the first at row 2, with token type 0 added.

    Args:
        theirs: (P, C).
        skipped: rows before the first position.
        types: (types, C), or None.

    Returns:
        (P - skipped + 2, C).
    """
    rows = theirs[skipped:]
    if types is not None:
        rows = rows + types[0]
    return torch.cat([torch.zeros(_FIRST, theirs.shape[1]), rows])


def _add_output(weights: dict[str, Tensor]) -> list[str]:
    """Add what the head for words lacks, in place: its output is the embedding's, and a missing head passes on.

    Returns:
        What to say of it.
    """
    words = weights[WORDS]  # (V, C)
    dim = words.shape[1]
    head = {
        "dense.weight": torch.eye(dim),
        "dense.bias": torch.zeros(dim),
        "layer_norm.weight": torch.ones(dim),
        "layer_norm.bias": torch.zeros(dim),
        "bias": torch.zeros(len(words)),
    }
    missing = not any(name.startswith("encoder.lm_head.") for name in weights)
    if missing:
        weights |= {f"encoder.lm_head.{name}": tensor for name, tensor in head.items()}
    weights.setdefault(OUTPUT, words)
    return ["has no head for masked words; that of the checkpoint is untrained"] if missing else []


def _labels(config: Mapping[str, Any], classes: int) -> list[str]:
    """The names of the classes, fit for a dictionary: one word each."""
    names = config.get("id2label")
    names = names if isinstance(names, dict) else {}
    found = ["_".join(str(names.get(str(i), f"LABEL_{i}")).split()) for i in range(classes)]
    return found if len({*found}) == classes and all(found) else [f"LABEL_{i}" for i in range(classes)]


def _options(
    folder: Path,
    config: Mapping[str, Any],
    kind: str,
    weights: Mapping[str, Tensor],
    labels: list[str] | None,
    tied: bool,
) -> Namespace:
    """fairseq's options, as `fairseq-train` records them. Raises UserError, naming the option of config.json."""
    positions = weights[POSITIONS].shape[0] - _FIRST
    eps = float(config.get("layer_norm_eps", _THEIR_EPS))
    dropout = float(config.get("hidden_dropout_prob", 0.1))
    pooler = config.get("classifier_dropout")
    options = {
        "arch": "roberta" if eps == FAIRSEQ_EPS else f"{PREFIX}roberta",
        "encoder_layers": _whole(folder, config, "num_hidden_layers"),
        "encoder_embed_dim": weights[WORDS].shape[1],
        "encoder_ffn_embed_dim": weights["encoder.sentence_encoder.layers.0.fc1.bias"].shape[0]
        if "encoder.sentence_encoder.layers.0.fc1.bias" in weights
        else _whole(folder, config, "intermediate_size"),
        "encoder_attention_heads": _whole(folder, config, "num_attention_heads"),
        "activation_fn": ACTIVATIONS[config.get("hidden_act", "gelu")],
        "pooler_activation_fn": "tanh",
        "layer_norm_eps": eps,
        "dropout": dropout,
        "attention_dropout": float(config.get("attention_probs_dropout_prob", 0.1)),
        "activation_dropout": 0.0,
        "pooler_dropout": dropout if pooler is None else float(pooler),
        "max_positions": positions,
        "tokens_per_sample": positions,
        "untie_weights_roberta": not tied,
        "data": "",
        "seed": 1,
        "optimizer": "adam",
        "lr_scheduler": "polynomial_decay",
    }
    if labels is None:
        return Namespace(**options, task="masked_lm", criterion="masked_lm")
    return Namespace(
        **options,
        task="sentence_prediction",
        criterion="sentence_prediction",
        classification_head_name=HEAD,
        num_classes=len(labels),
        regression_target=len(labels) == 1,
        init_token=0,
        separator_token=None if kind == "bert" else 2,
    )


def _whole(folder: Path, config: Mapping[str, Any], name: str, least: int = 1) -> int:
    value = config.get(name)
    if type(value) is not int or value < least:
        raise UserError(f"{folder}: {name} in config.json is {value!r}; give a whole number from {least} up")
    return value


def _flags(args: Namespace) -> list[str]:
    """The options of fairseq-train that make this network, for the user to copy."""
    names = ("encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads", "max_positions")
    flags = ["--arch", f"{PREFIX}roberta"]
    for name in (*names, *(("layer_norm_eps",) if args.layer_norm_eps != FAIRSEQ_EPS else ())):
        flags += [f"--{name.replace('_', '-')}", f"{getattr(args, name):g}"]
    if args.activation_fn != "gelu":
        flags += ["--activation-fn", args.activation_fn]
    return flags + ["--untie-weights-roberta"] * args.untie_weights_roberta
