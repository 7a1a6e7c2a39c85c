"""Register the criteria of this package with fairseq."""

from . import ipq  # noqa: F401
