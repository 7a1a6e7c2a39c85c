"""Training with Quantization Noise for extreme model compression (arXiv 2004.07320), as a fairseq `--user-dir` plugin.

Given to fairseq as `--user-dir`, importing this package registers its models and criteria; nothing else happens.
Imported where fairseq is not, it is the core alone: noise, product quantization and the packed file, for any model.
"""

import sys

from .api import attach_noise, detach_noise, keep_layers_, load, noise_of, quantize_, save, share_layers_
from .errors import DamagedFileError, UserError
from .plan.rules import Plan
from .quantization.importance import second_moments

__version__ = "0.1.0"
__all__ = [
    "DamagedFileError",
    "Plan",
    "UserError",
    "attach_noise",
    "detach_noise",
    "keep_layers_",
    "load",
    "noise_of",
    "quantize_",
    "register",
    "save",
    "second_moments",
    "share_layers_",
]


def register() -> None:
    """Register the models, tasks and criteria with fairseq, and take over its loading of checkpoints and its quantizer.

    Called on import where fairseq is in use already. Call it yourself after importing this package before fairseq;
    a second call changes nothing.

    Raises:
        ImportError: fairseq is not installed.
    """
    from .plugin import criterions, data_parallel, mistakes, models, numpy_names, precision, tasks
    from .plugin import loading as checkpoints
    from .plugin import saving as checkpoint_files  # noqa: F401
    from .plugin.training import divergence as diverged  # noqa: F401
    from .plugin.training import ema, half_precision, resume
    from .plugin.training import hooks as trainer_hooks
    from .plugin.training import stages as training

    files, halves = (checkpoints, checkpoint_files, numpy_names), (precision, half_precision, data_parallel)
    for part in (*files, diverged, ema, *halves, resume, trainer_hooks, training, mistakes):
        part.install()


if "fairseq" in sys.modules:
    register()
