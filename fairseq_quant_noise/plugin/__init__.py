"""Everything that knows fairseq. To import it is to register with fairseq, as `--user-dir` and `register()` do."""

from .registration import register

register()
