"""The models that fairseq gets from this package, under their registered names."""

from . import roberta, transformer, transformer_lm  # noqa: F401
