"""Rename RoBERTa's modules and tensors between fairseq's names and those of Hugging Face's RoBERTa and BERT."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..structure.state import stack_sizes
from .roberta_config import FAIRSEQ_EPS

T = TypeVar("T")

ENCODER = "encoder.sentence_encoder"
WORDS, POSITIONS, OUTPUT = (
    f"{ENCODER}.embed_tokens.weight",
    f"{ENCODER}.embed_positions.weight",
    "encoder.lm_head.weight",
)
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"  # fairseq has none

#: fairseq's name of each of their nonlinearities.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_accurate",
    "gelu_pytorch_tanh": "gelu_accurate",
    "gelu_fast": "gelu_accurate",
    "relu": "relu",
    "tanh": "tanh",
}

#: Prefix of a network's tensors inside one with a head; XLM-R's is RoBERTa's.
PREFIXES = {"roberta": "roberta.", "xlm-roberta": "roberta.", "bert": "bert."}

_BODY = {
    "embed_tokens": "embeddings.word_embeddings",
    "embed_positions": "embeddings.position_embeddings",
    "layernorm_embedding": "embeddings.LayerNorm",
}
_LAYER = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}
_OF_WORDS = {
    "roberta": {
        "dense": "lm_head.dense",
        "layer_norm": "lm_head.layer_norm",
        "weight": "lm_head.decoder.weight",
        "bias": "lm_head.bias",
    },
    "bert": {
        "dense": "cls.predictions.transform.dense",
        "layer_norm": "cls.predictions.transform.LayerNorm",
        "weight": "cls.predictions.decoder.weight",
        "bias": "cls.predictions.bias",
    },
}
_OF_CLASSES = {
    "roberta": {"dense": "classifier.dense", "out_proj": "classifier.out_proj"},
    "bert": {"dense": "bert.pooler.dense", "out_proj": "classifier"},
}


def their_names(
    layers: int, kind: str = "roberta", prefix: str = "roberta.", head: str | None = None
) -> dict[str, str]:
    """Hugging Face's name of each of fairseq's modules, or tensors where one module of fairseq's is several of theirs.

    Args:
        layers: number of layers.
        kind: a key of PREFIXES.
        prefix: of the network in a network with a head; empty for a network without one.
        head: fairseq's name of the classification head, if there is one.
    """
    family = "bert" if kind == "bert" else "roberta"
    names = {f"{ENCODER}.{ours}": f"{prefix}{theirs}" for ours, theirs in _BODY.items()}
    for i in range(layers):
        place = f"{prefix}encoder.layer.{i}."
        names |= {f"{ENCODER}.layers.{i}.{ours}": place + theirs for ours, theirs in _LAYER.items()}
    names |= {f"encoder.lm_head.{ours}": theirs for ours, theirs in _OF_WORDS[family].items()}
    if head is not None:
        names |= {f"classification_heads.{head}.{ours}": theirs for ours, theirs in _OF_CLASSES[family].items()}
    return names


def renamed(state: Mapping[str, T], names: Mapping[str, str]) -> tuple[dict[str, T], list[str]]:
    """Rename the entries of `state`, which are of the modules in `names` or, as codes are, of a tensor of theirs.

    Returns:
        The renamed entries, and the names that are of no module in `names`.
    """
    found: dict[str, T] = {}
    unknown = []
    for name, value in state.items():
        new = _renamed(name, names)
        if new is None:
            unknown.append(name)
        else:
            found[new] = value
    return found, unknown


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    module, rest = name, ""
    while module:
        if module in names:
            return names[module] + rest
        module, _, last = module.rpartition(".")
        rest = f".{last}{rest}"
    return None


def is_theirs(model: nn.Module) -> bool:
    """Whether `model` is a RoBERTa, XLM-R or BERT of transformers."""
    return getattr(getattr(model, "config", None), "model_type", None) in PREFIXES


def state_for(model: nn.Module, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of a fairseq RoBERTa as `model`, a RoBERTa of transformers, loads it.

    Heads that `model` lacks are left out. Its token types become zero, since fairseq has none.

    Args:
        model: with the sizes of the network in `state`.
        state: tensors and entries of quantized weights, under fairseq's names.
        options: fairseq's options of the network.

    Raises:
        UserError: `model` is a BERT, has another option than the network, or has a head for classes where the state has
            none or several.
    """
    config: Any = model.config
    kind: str = config.model_type
    if kind == "bert":
        raise UserError(
            "this network is a BERT, whose words have another order than fairseq's; load into the RoBERTa of the "
            "folder that `fairseq-quant-noise to-hf` makes of the file"
        )
    _check_config(config, options)
    own = model.state_dict()
    prefix = PREFIXES[kind] if any(name.startswith(PREFIXES[kind]) for name in own) else ""
    head = _head_of(state) if any(name.startswith("classifier.") for name in own) else None
    layers = stack_sizes(state)[f"{ENCODER}.layers"]
    theirs, _ = renamed(state, their_names(layers, kind, prefix, head))
    has_output = "lm_head.bias" in own
    found = {name: value for name, value in theirs.items() if has_output or not name.startswith("lm_head.")}
    if "lm_head.decoder.bias" in own:
        found["lm_head.decoder.bias"] = found["lm_head.bias"]
    found[prefix + TOKEN_TYPES] = torch.zeros_like(own[prefix + TOKEN_TYPES])
    buffers = {name for name, _ in model.named_buffers()} & own.keys()
    return found | {name: own[name] for name in buffers if name not in found}


def _check_config(config: Any, options: Mapping[str, Any]) -> None:
    """Refuse a network that computes something else. Raises UserError, naming the option of config.json."""
    eps, activation = options.get("layer_norm_eps") or FAIRSEQ_EPS, str(options.get("activation_fn") or "gelu")
    tied = not options.get("untie_weights_roberta")
    wanted = {
        "layer_norm_eps": (config.layer_norm_eps, eps, config.layer_norm_eps == eps),
        "hidden_act": (config.hidden_act, activation, ACTIVATIONS.get(str(config.hidden_act)) == activation),
        "tie_word_embeddings": (config.tie_word_embeddings, tied, tied or not config.tie_word_embeddings),
    }
    for name, (there, ours, same) in wanted.items():
        if not same:
            raise UserError(f"{name} is {there!r} in this network's configuration and {ours!r} in the file; set it so")


def _head_of(state: Mapping[str, object]) -> str:
    """The name of the only head for classes. Raises UserError where there is none or more than one."""
    names = {name.split(".")[1] for name in state if name.startswith("classification_heads.")}
    if len(names) != 1:
        said = f"the heads {', '.join(sorted(names))}" if names else "none"
        raise UserError(f"this network has a head for classes, and the file has {said}; load into one that has as many")
    return names.pop()
