"""Refuse to resume a run whose network has other settings than the command's.

A run finds the checkpoint_last.pt in its save_dir and goes on from it. Where several trainings are given one save_dir,
as a sweep over the noise may be, all but the first would find a run that is complete, and end without an update.
"""

from pathlib import Path
from typing import Any

from fairseq.models import ARCH_MODEL_NAME_REGISTRY, MODEL_DATACLASS_REGISTRY
from omegaconf import DictConfig, OmegaConf

from ...checkpoints.safe_load import saved_options
from ...errors import UserError
from ..models.layers import record_layers

#: What says how the network is computed or watched, and not what it is.
_FREE = {
    *("_name", "checkpoint_activations", "offload_activations", "min_params_to_wrap"),
    *("quant_noise_log_interval", "quant_noise_gap_batches"),
}


def check_same(trainer: Any, filename: str) -> None:
    """Check that the run's own last checkpoint has the network's settings; --restore-file takes it in any case.

    Args:
        trainer: fairseq's.
        filename: the checkpoint in save_dir that fairseq is about to load.

    Raises:
        UserError: a setting differs.
    """
    options, now = trainer.cfg.checkpoint, trainer.cfg.model
    last = Path(options.save_dir, f"checkpoint_last{trainer.checkpoint_suffix}.pt")
    if options.restore_file != last.name or not last.is_file() or not isinstance(now, DictConfig):
        return
    changed = _changed(saved_options(filename), _to_be_saved(trainer, now), _of_the_model(now))
    if changed:
        name, before, after = changed[0]
        more = f" (and {', '.join(name for name, *_ in changed[1:])})" if changed[1:] else ""
        raise UserError(
            f"{filename}: was trained with {name} {before}, and the command says {after}{more}; give each training a "
            f"--save-dir of its own, or --restore-file {filename} to go on from it all the same"
        )


def _changed(before: dict[str, Any], after: dict[str, Any], names: set[str]) -> list[tuple[str, Any, Any]]:
    """The settings of `names` that both have and that differ: name, before, after."""
    both = sorted(names & before.keys() & after.keys())
    return [(name, before[name], after[name]) for name in both if before[name] != after[name]]


def _to_be_saved(trainer: Any, now: DictConfig) -> dict[str, Any]:
    """The settings as a checkpoint of this run would have them."""
    copied = OmegaConf.create({"model": OmegaConf.to_container(now, resolve=True, enum_to_str=True)}).model
    record_layers(trainer.get_model(), copied)
    saved = OmegaConf.to_container(copied)
    return {str(name): value for name, value in saved.items()} if isinstance(saved, dict) else {}


def _of_the_model(now: DictConfig) -> set[str]:
    """The options that are the model's own; those that it takes over from other sections, as the data's, are not."""
    name = ARCH_MODEL_NAME_REGISTRY.get(now.get("_name"), now.get("_name"))
    declared = getattr(MODEL_DATACLASS_REGISTRY.get(name), "__dataclass_fields__", {})
    return {
        name
        for name, field in declared.items()
        if name not in _FREE and not str(field.default).startswith("${") and not name.endswith("_layers_to_keep")
    }
