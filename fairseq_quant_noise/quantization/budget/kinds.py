"""The three kinds of weights that a plan keeps apart, as the paper's stages do."""

from torch import nn

from ...weights.discovery import Weight

OTHERS, EMBEDDINGS, ATTENTION = "Feed-forward and other layers", "Embeddings", "Attention"
ORDER = (OTHERS, EMBEDDINGS, ATTENTION)  # of the stages, as the paper's


def kind_of(weight: Weight) -> str:
    """The group of stages that a weight belongs to, one of ORDER."""
    module, name = weight.module, weight.name
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) or "embed" in name:
        return EMBEDDINGS
    return ATTENTION if isinstance(module, nn.MultiheadAttention) or "att" in name else OTHERS
