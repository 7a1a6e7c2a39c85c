"""fairseq's networks in plain PyTorch, by fairseq's names, to evaluate packed files without fairseq."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..errors import UserError
from ..structure.modules import share_layers_
from .decoder_config import given_options
from .efficientnet import EfficientNet
from .efficientnet_config import EfficientNetConfig
from .roberta import Roberta, RobertaConfig
from .transformer import Transformer, TransformerConfig
from .transformer_lm import TransformerLM, TransformerLMConfig

__all__ = [
    "NETWORKS",
    "EfficientNet",
    "EfficientNetConfig",
    "Roberta",
    "RobertaConfig",
    "Transformer",
    "TransformerConfig",
    "TransformerLM",
    "TransformerLMConfig",
    "build",
]


def _transformer_lm(options: Mapping[str, Any], vocab_size: int, padding_idx: int) -> nn.Module:
    return TransformerLM(TransformerLMConfig.from_fairseq(options, vocab_size, padding_idx))


def _roberta(options: Mapping[str, Any], vocab_size: int, padding_idx: int) -> nn.Module:
    return Roberta(RobertaConfig.from_fairseq(options, vocab_size, padding_idx))


def _transformer(options: Mapping[str, Any], vocab_size: int, padding_idx: int) -> nn.Module:
    return Transformer(TransformerConfig.from_fairseq(options, vocab_size, padding_idx))


def _efficientnet(options: Mapping[str, Any], vocab_size: int, padding_idx: int) -> nn.Module:
    return EfficientNet(EfficientNetConfig.from_fairseq(options))


#: How to build each model from fairseq's options; an architecture is found by its model's name as a prefix, the longest
#: first.
NETWORKS: dict[str, Callable[[Mapping[str, Any], int, int], nn.Module]] = {
    "transformer_lm": _transformer_lm,
    "quant_noise_transformer_lm": _transformer_lm,
    "roberta": _roberta,
    "quant_noise_roberta": _roberta,
    "transformer": _transformer,
    "quant_noise_transformer": _transformer,
    "quant_noise_efficientnet": _efficientnet,
}


def build(name: str, options: Mapping[str, Any], vocab_size: int, padding_idx: int = 1) -> nn.Module:
    """The network that fairseq's model or architecture `name` with `options` describes, untrained.

    Args:
        name: such as `transformer_lm` or `transformer_lm_wiki103`.
        options: fairseq's `cfg.model` as a dict; of a RoBERTa with its `classification_heads`, of a `transformer` with
            its `source_vocab_size` where it is another one.
        vocab_size: the number of words in the (target's) dictionary; networks for images do not look at it.
        padding_idx: the dictionary's padding word.

    Raises:
        UserError: the network, or one of its options, is not implemented without fairseq.
    """
    for model, builder in NETWORKS.items():
        if name == model or name.startswith(model + "_"):
            network = builder({"_name": name, **options}, vocab_size, padding_idx)
            chunk = given_options(options, ["share_layers"]).get("share_layers", 1)
            return share_layers_(network, chunk) if chunk != 1 else network
    raise UserError(
        f"model {name!r} is not implemented without fairseq (only {', '.join(NETWORKS)}); "
        "evaluate it with fairseq-eval-lm, fairseq-validate or fairseq-generate and --user-dir instead"
    )
