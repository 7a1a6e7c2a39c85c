"""Register the tasks of this package with fairseq."""

from . import image_classification  # noqa: F401
