"""Hold all code that needs fairseq. Importing this registers with fairseq, as `--user-dir` and `register()` do."""

from .registration import register

__all__ = ["register"]

register()
