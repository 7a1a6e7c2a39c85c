"""Register the models, tasks and criteria of this package with fairseq, and install the patches of patches.py."""

from . import criterions, models, tasks, word_pieces  # noqa: F401 (importing them registers them)
from .patches import install


def register() -> None:
    """Register with fairseq; a second call changes nothing."""
    install()
