"""The models that fairseq gets from this package, under their registered names."""

from . import transformer_lm  # noqa: F401
