"""Train with Quantization Noise for extreme model compression (arXiv 2004.07320): PyTorch, and a fairseq plugin.

Importing this package changes nothing in fairseq. `--user-dir` and `register()` do: they register models, tasks and
criteria and install the patches listed in plugin/patches.py. All else here works where fairseq is not installed.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import DamagedFileError, UserError

if TYPE_CHECKING:
    from .api import (
        attach_noise,
        detach_noise,
        keep_layers_,
        learn_layerdrop_,
        load,
        noise_of,
        quantize_,
        save,
        share_layers_,
    )
    from .plan.plan import Plan
    from .quantization.importance import second_moments
    from .weights.blocks import cover

__all__ = [
    "DamagedFileError",
    "Plan",
    "UserError",
    "__version__",
    "attach_noise",
    "cover",
    "detach_noise",
    "keep_layers_",
    "learn_layerdrop_",
    "load",
    "noise_of",
    "quantize_",
    "register",
    "save",
    "second_moments",
    "share_layers_",
]

#: Where the names of `__all__` are that are not in api.py. They are imported when they are first asked for: torch takes
#: a second, which `--help` need not wait for.
_ELSEWHERE = {"Plan": ".plan.plan", "cover": ".weights.blocks", "second_moments": ".quantization.importance"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_ELSEWHERE.get(name, ".api"), __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register() -> None:
    """Do what `--user-dir` does, for a Python program that uses fairseq.

    A second call only reaches the modules of fairseq that were imported since.

    Raises:
        ImportError: fairseq is not installed.
    """
    from .plugin import register as register_with_fairseq

    register_with_fairseq()
