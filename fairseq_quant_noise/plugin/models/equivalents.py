"""Register `quant_noise_…` for each fairseq architecture with a model here, whose packed files load without fairseq.

Every other architecture is made a model of this package as it is built (`any_model.py`).
"""

from typing import Any

from fairseq.models import (
    ARCH_CONFIG_REGISTRY,
    ARCH_MODEL_REGISTRY,
    MODEL_REGISTRY,
    register_model_architecture,
)
from fairseq.tasks import TASK_REGISTRY
from fairseq.tasks.multilingual_translation import MultilingualTranslationTask

from ...errors import UserError
from ...networks.registry import PREFIX
from .any_model import is_ours, model_class


def register_equivalents() -> None:
    """Register `quant_noise_ARCH` for every ARCH of fairseq's whose model has a subclass here, where it is missing."""
    ours = {_of_fairseq(model): name for name, model in MODEL_REGISTRY.items() if is_ours(model)}
    for architecture, model in list(ARCH_MODEL_REGISTRY.items()):
        name = f"{PREFIX}{architecture}"
        if model in ours and name not in ARCH_MODEL_REGISTRY:
            register_model_architecture(ours[model], name)(ARCH_CONFIG_REGISTRY[architecture])


def cure(name: str) -> str:
    """Say what to do about a model that its task builds by itself, not by `fairseq.models.build_model`."""
    if f"{PREFIX}{name}" in ARCH_MODEL_REGISTRY:
        return f"train with --arch {PREFIX}{name}, into which a checkpoint of {name} loads"
    return "let its task build it by fairseq.models.build_model"


def check_task(options: Any, task: Any) -> None:
    """Refuse a model of this package's own for a task that trains a model of models, one for each pair of languages.

    Args:
        options: `cfg.model` of a training.
        task: `cfg.task`.

    Raises:
        UserError: it names the task, the model, and the architecture and the task to give instead.
    """
    model = None if options is None else model_class(options)
    kind = TASK_REGISTRY.get(getattr(task, "_name", None) or getattr(task, "task", None) or "")
    if kind is not None and is_ours(model) and issubclass(kind, MultilingualTranslationTask):
        raise UserError(
            f"--task {task._name}: trains one model for each pair of languages; give --arch multilingual_transformer, "
            "or one model for all pairs by --task translation_multi_simple_epoch"
        )


def _of_fairseq(model: Any) -> Any:
    """Find the registered fairseq model that one of this package extends."""
    return next((base for base in model.__mro__[1:] if base in MODEL_REGISTRY.values()), None)
