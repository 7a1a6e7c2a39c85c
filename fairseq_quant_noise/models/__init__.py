"""The door for fairseq, which imports the folder `models` of what `--user-dir` names; they are in plugin/models."""

from .. import plugin  # noqa: F401 (to import it is to register)
