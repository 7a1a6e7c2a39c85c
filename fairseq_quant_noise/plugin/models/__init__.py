"""The models that fairseq gets from this package, under their registered names."""

from . import efficientnet, roberta, transformer, transformer_lm  # noqa: F401
from .equivalents import register_equivalents

register_equivalents()
