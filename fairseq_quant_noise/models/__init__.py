"""Let fairseq import the folder `models` of `--user-dir`; the models themselves are in plugin/models."""

from .. import plugin  # noqa: F401 (to import it is to register)
