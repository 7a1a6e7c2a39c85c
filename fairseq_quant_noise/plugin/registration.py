"""Make fairseq know this package: its models, tasks and criterions, and the replaced names of patches.py."""

from . import criterions, models, tasks  # noqa: F401 (importing them registers them)
from .patches import install


def register() -> None:
    """Register with fairseq; a second call changes nothing."""
    install()
