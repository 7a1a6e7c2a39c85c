"""The criteria that fairseq gets from this package."""

from . import ipq  # noqa: F401
