"""The tasks that fairseq gets from this package."""

from . import image_classification  # noqa: F401
