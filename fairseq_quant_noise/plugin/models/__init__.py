"""Register the models of this package with fairseq."""

from . import efficientnet, roberta, transformer, transformer_lm  # noqa: F401
from .equivalents import register_equivalents

register_equivalents()
