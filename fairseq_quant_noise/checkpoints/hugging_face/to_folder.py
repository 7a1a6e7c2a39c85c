"""Convert a checkpoint or a packed file of a RoBERTa to a Hugging Face folder, which transformers loads by itself.

The folder is of model_type roberta, also for a network that came from a BERT: its words are in fairseq's order, and its
positions begin at row 2. It has the heads that the network has, one of them for classes at most.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..._version import __version__
from ...artifact import dense_state, read
from ...artifact.network import network_of
from ...artifact.reader import is_packed
from ...errors import UserError
from ...networks.hugging_face import ACTIVATIONS, OUTPUT, TOKEN_TYPES, renamed, their_names
from ...networks.roberta import Roberta
from ...networks.roberta_config import RobertaConfig
from ..checkpoint import Checkpoint
from ..hint import CONFIG, is_hugging_face
from .folder import WEIGHTS, as_json
from .their_files import labels_in, tokenizer_files

_MODEL = "roberta"
_PREFIX = "roberta."


def to_folder(path: str | Path, dictionary: str | Path | None = None) -> tuple[dict[str, bytes], list[str]]:
    """Convert the checkpoint or packed file `path`.

    Args:
        path: of a dense checkpoint, one with quantized weights, or a packed file.
        dictionary: the folder of dict.txt, of the tokenizer's files that `from_folder` made, and of label/dict.txt; by
            default that of `path`.

    Returns:
        The files of the folder by name, and what the user should know.

    Raises:
        UserError: the file cannot be read, or its network has an option or a tensor that their RoBERTa lacks.
        DamagedFileError: the file is not whole.
    """
    model = _network(path)
    config, head = model.config, _head(path, model)
    _check_options(path, config, head)
    weights = dense_state(model.state_dict())
    notes = []
    if config.activation_fn != "gelu":
        notes.append(f"left out encoder.lm_head: theirs has gelu, not {config.activation_fn}")
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("encoder.lm_head.")}
    theirs = _renamed(weights, config, head)
    place = Path(dictionary) if dictionary is not None else Path(path).absolute().parent
    found, said = tokenizer_files(place, config.vocab_size, config.max_positions, required=dictionary is not None)
    options = _options(config, head)
    labels = labels_in(place) if head is not None else None
    if labels is not None and len(labels) == config.classification_heads[head or ""][1]:
        options["id2label"] = {str(i): label for i, label in enumerate(labels)}
        options["label2id"] = {label: i for i, label in enumerate(labels)}
    files = {
        CONFIG: as_json(options),
        WEIGHTS[0]: safetensors.torch.save(theirs, {"format": "pt"}),
    }
    return {**files, **found}, notes + said


def _network(path: str | Path) -> Roberta:
    """The network of a checkpoint or a packed file. Raises UserError where it is no RoBERTa."""
    if is_hugging_face(path):
        raise UserError(f"{path}: is a Hugging Face folder already; give a fairseq checkpoint or a packed file")
    network: nn.Module = network_of(path, read(path)) if is_packed(path) else Checkpoint(path).network
    if not isinstance(network, Roberta):
        raise UserError(f"{path}: is a {type(network).__name__}, and only a RoBERTa can be a Hugging Face folder")
    return network


def _head(path: str | Path, model: Roberta) -> str | None:
    heads = [*model.classification_heads]
    if len(heads) > 1:
        raise UserError(
            f"{path}: has the heads {', '.join(heads)}, and a Hugging Face folder holds one; fine-tune without "
            "--load-checkpoint-heads first"
        )
    return heads[0] if heads else None


def _check_options(path: str | Path, config: RobertaConfig, head: str | None) -> None:
    """Refuse a network that their RoBERTa does not compute. Raises UserError, naming fairseq's option."""
    dim = config.encoder_embed_dim
    refused = {
        "encoder_normalize_before": config.encoder_normalize_before,
        "layernorm_embedding": not config.layernorm_embedding,
        "quant_noise_embedding_layer": config.quant_noise_embedding_layer,
        "activation_fn": config.activation_fn not in ACTIVATIONS.values()
        or (head is None and config.activation_fn != "gelu"),
        "pooler_activation_fn": head is not None and config.pooler_activation_fn != "tanh",
    }
    for name in (name for name, wrong in refused.items() if wrong):
        raise UserError(f"{path}: option {name}={getattr(config, name)!r} has no place in Hugging Face's RoBERTa")
    if head is not None and config.classification_heads[head][0] != dim:
        raise UserError(
            f"{path}: classification_heads.{head}.dense.weight has {config.classification_heads[head][0]} rows, and "
            f"Hugging Face's has as many as the network is wide, {dim}"
        )


def _renamed(weights: Mapping[str, Tensor], config: RobertaConfig, head: str | None) -> dict[str, Tensor]:
    """The tensors under their names, none sharing memory; an output that is tied is left out, as they do."""
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(".version")}
    if not config.untie_weights_roberta:
        weights.pop(OUTPUT, None)
    theirs, unknown = renamed(weights, their_names(config.encoder_layers, _MODEL, _PREFIX, head))
    if unknown:
        raise UserError(f"{unknown[0]}: has no place in Hugging Face's RoBERTa")
    theirs[f"{_PREFIX}{TOKEN_TYPES}"] = torch.zeros(1, config.encoder_embed_dim)
    return {name: tensor.detach().float().clone().contiguous() for name, tensor in theirs.items()}


def _options(config: RobertaConfig, head: str | None) -> dict[str, Any]:
    """config.json."""
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    classes = {} if head is None else {"num_labels": config.classification_heads[head][1]}
    return {
        "architectures": ["RobertaForMaskedLM" if head is None else "RobertaForSequenceClassification"],
        "model_type": _MODEL,
        "vocab_size": config.vocab_size,
        "hidden_size": config.encoder_embed_dim,
        "num_hidden_layers": config.encoder_layers,
        "num_attention_heads": config.encoder_attention_heads,
        "intermediate_size": config.encoder_ffn_embed_dim,
        "hidden_act": activations[config.activation_fn],
        "layer_norm_eps": config.layer_norm_eps,
        "max_position_embeddings": config.max_positions + config.padding_idx + 1,
        "type_vocab_size": 1,
        "bos_token_id": 0,
        "pad_token_id": config.padding_idx,
        "eos_token_id": 2,
        "tie_word_embeddings": not config.untie_weights_roberta,
        "torch_dtype": "float32",
        "producer": f"fairseq_quant_noise {__version__}",
        **classes,
    }
