"""Implement fairseq's networks in plain PyTorch under fairseq's names, to evaluate packed files without fairseq."""

from .efficientnet import EfficientNet
from .efficientnet_config import EfficientNetConfig
from .registry import NETWORKS, build
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
