"""Provide the names of numpy that fairseq 0.12 uses and later releases of numpy removed.

| name | gone in | without it |
|---|---|---|
| `np.compat.long` | 2.3 | no --sample-break-mode eos, no text from a language model, no --num-batch-buckets |
| `np.percentile(interpolation=)` | 2.4 | no --num-batch-buckets |
| `np.float` | 1.24 | no nacrf_transformer |

Each module of fairseq that uses one gets a `np` of its own, numpy with these names. numpy itself is left alone.
"""

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np


class NumpyAsItWas(ModuleType):
    """numpy, with the names that were removed."""

    float = float
    compat = SimpleNamespace(long=int)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def percentile(a: Any, q: Any, interpolation: str = "linear") -> Any:
        """numpy.percentile by the name that its argument `method` had before numpy 1.22."""
        method: Any = interpolation
        return np.percentile(a, q, method=method)


numpy = NumpyAsItWas("numpy")
