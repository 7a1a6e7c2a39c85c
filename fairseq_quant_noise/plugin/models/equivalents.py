"""Register `quant_noise_…` for each fairseq architecture with a model here, and refuse fairseq's own noise.

With the plugin loaded and the prefix forgotten, fairseq's own noise would overwrite most of the weights silently
(upstream 38), and its int8 noise needs a GPU. Such a training is refused before it begins.
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

from ...checkpoints.options import NOISE_FLAGS
from ...errors import UserError
from ...networks.registry import PREFIX
from .quantizable import Quantizable


def register_equivalents() -> None:
    """Register `quant_noise_ARCH` for every ARCH of fairseq's whose model has a subclass here, where it is missing."""
    ours = {_of_fairseq(model): name for name, model in MODEL_REGISTRY.items() if _is_ours(model)}
    for architecture, model in list(ARCH_MODEL_REGISTRY.items()):
        name = f"{PREFIX}{architecture}"
        if model in ours and name not in ARCH_MODEL_REGISTRY:
            register_model_architecture(ours[model], name)(ARCH_CONFIG_REGISTRY[architecture])


def cure(name: str) -> str:
    """Say what to do instead of training fairseq's model or architecture `name` here, naming only what exists."""
    if f"{PREFIX}{name}" in ARCH_MODEL_REGISTRY:
        return f"train with --arch {PREFIX}{name}, into which a checkpoint of {name} loads"
    families = ", ".join(own for own, model in MODEL_REGISTRY.items() if _is_ours(model))
    return f"this package has no model for it; it has {families}"


def check_noise(options: Any) -> None:
    """Refuse a training of one of fairseq's models under fairseq's own noise.

    Args:
        options: `cfg.model` of a training.

    Raises:
        UserError: it names the option, the model, and the architecture to train.
    """
    model = _model(options)
    if model is None or _is_ours(model):
        return
    name = getattr(options, "_name", None) or options.arch
    for flag in NOISE_FLAGS:
        if getattr(options, flag, None):
            raise UserError(
                f"--{flag.replace('_', '-')}: {name} would train under fairseq's own noise, which overwrites the "
                f"weights; {cure(name)}"
            )


def check_task(options: Any, task: Any) -> None:
    """Refuse a model of this package for a task that trains one model for each pair of languages.

    Args:
        options: `cfg.model` of a training.
        task: `cfg.task`.

    Raises:
        UserError: it names the task, the model, and a task that trains one model for all pairs.
    """
    model, kind = _model(options), TASK_REGISTRY.get(getattr(task, "_name", None) or getattr(task, "task", None) or "")
    if model is not None and kind is not None and _is_ours(model) and issubclass(kind, MultilingualTranslationTask):
        raise UserError(
            f"--task {task._name}: trains fairseq's multilingual_transformer, one model for each pair of languages, "
            "which this package does not have; give --task translation_multi_simple_epoch"
        )


def _model(options: Any) -> Any:
    """Find the class of the model whose options these are."""
    name = getattr(options, "_name", None) or getattr(options, "arch", None) or ""
    return ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name)


def _is_ours(model: Any) -> bool:
    return issubclass(model, Quantizable)


def _of_fairseq(model: Any) -> Any:
    """Find the registered fairseq model that one of this package extends."""
    return next((base for base in model.__mro__[1:] if base in MODEL_REGISTRY.values()), None)
