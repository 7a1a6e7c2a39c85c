"""Register the networks by name: which there are, what fairseq calls them, and how to build each."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UserError
from ..structure.modules import share_layers_
from .efficientnet import EfficientNet
from .efficientnet_config import EfficientNetConfig
from .options import given_options
from .roberta import Roberta, RobertaConfig
from .transformer import Transformer, TransformerConfig
from .transformer_lm import TransformerLM, TransformerLMConfig

PREFIX = "quant_noise_"  # this package's name of a model is fairseq's with it in front

#: fairseq's names of the models that this package knows, longest first: look-up is by prefix.
MODELS = ("transformer_lm", "roberta", "transformer", "efficientnet")

OF_IMAGES = ("efficientnet",)  # the models for images: fairseq does not have them, and they have no vocabulary

PADDING = 1  # fairseq's index of the padding word


class NoNetworkError(UserError):
    """Options from which no network can be built."""


def stock_name(path: str | Path, name: str) -> str:
    """fairseq's own name of the model behind a model's or an architecture's name.

    A checkpoint's configuration holds every option, so that the architecture, which only sets defaults, can go.

    Raises:
        UserError: this package does not know the model.
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


def meta_model(architecture: str, options: Mapping[str, Any], vocab_size: int, padding_idx: int = PADDING) -> nn.Module:
    """Build the network of an architecture on the meta device, without memory for its weights.

    The options may come with a file and hold anything; a false size costs nothing here.

    Args:
        architecture: the name, as `build` takes it.
        options: as for `build`.
        vocab_size: as for `build`.
        padding_idx: as for `build`.

    Raises:
        NoNetworkError: the options do not make a network.
        UserError: the network, or one of its options, is not implemented without fairseq.
    """
    try:
        with torch.device("meta"), _WithoutNumbers():
            return build(architecture, options, vocab_size, padding_idx)
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise NoNetworkError(f"{architecture}: these options make no network ({reason}); change one of them") from None


class _WithoutNumbers(TorchFunctionMode):
    """Leave weights on the meta device as they are where a module draws or fills them.

    They hold no numbers, and torch would import its compiler to fill them, which takes longer than to import torch.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        if getattr(func, "__name__", "") in _FILLS and isinstance(filled, Tensor) and filled.is_meta:
            return filled
        return func(*args, **kwargs)


#: What fills a tensor with numbers: methods of tensors, and those of torch.nn.init that draw.
_FILLS = frozenset(
    ("normal_", "uniform_", "trunc_normal_", "xavier_normal_", "xavier_uniform_", "kaiming_normal_", "kaiming_uniform_")
)


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
