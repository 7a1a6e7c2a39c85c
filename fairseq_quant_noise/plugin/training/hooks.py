"""Hook into fairseq's Trainer: tell the noise of updates and epochs, save its state and measure it.

The noise goes by updates, which fairseq tells the model itself, and by epochs, which it does not. Codebooks and ranges
that were found at an earlier update are in the checkpoint, so that a resumed run makes the noise it would have made.
Where it was in its data is `resume.py`'s.
"""

import re
from typing import Any

import fairseq.trainer

from ...checkpoints.checksums import checksums
from ...checkpoints.keys import CHECKSUMS, NOISE, POSITION, SHAPES
from ...errors import UserError
from ...layers import QuantizedWeight
from ...layers.quantized import code_shapes
from ...noise import noise_of
from .. import sharded
from ..exits import exits_on_user_error
from ..metrics import drop_unmeasured
from ..mistakes import mismatch_in
from ..models.any_model import saved_as_stock
from ..models.layers import record_layers
from ..models.quantizable import check_noise
from ..saving import newest_whole
from . import ema, input_ranges, resume
from .best_so_far import forget_patience
from .codes import check_codes
from .endings import has_stages
from .gap import Gap
from .optimizer_order import state_by_name
from .progress import log_progress
from .settings import check_same

_LAYER = re.compile(r"(?<=\blayers)\.\d+")

_Trainer = fairseq.trainer.Trainer
_consolidate_optimizer = _Trainer.consolidate_optimizer
_begin_epoch, _save_checkpoint, _load_checkpoint = (
    _Trainer.begin_epoch,
    _Trainer.save_checkpoint,
    _Trainer.load_checkpoint,
)
_catalog_shared_params = fairseq.trainer._catalog_shared_params
_begin_valid_epoch, _valid_step = _Trainer.begin_valid_epoch, _Trainer.valid_step
_reduce_and_log_stats = _Trainer._reduce_and_log_stats


def begin_epoch(trainer: Any, epoch: int) -> Any:
    """Run Trainer.begin_epoch, and begin the noise's epoch."""
    input_ranges.begin_epoch(trainer, epoch)
    result = _begin_epoch(trainer, epoch)
    noise = noise_of(trainer.get_model())
    if noise is not None:
        noise.begin_epoch(epoch)
    return result


def begin_valid_epoch(trainer: Any, epoch: int) -> Any:
    """Run Trainer.begin_valid_epoch, measure ranges and the gap anew, and let --patience wait for the last stage."""
    if getattr(trainer.quantizer, "to_come", 0):
        forget_patience()
    input_ranges.calibrate(trainer)
    options = getattr(trainer.get_model(), "quant_noise_options", {})
    with exits_on_user_error():
        trainer.quant_noise_gap = Gap(trainer, options.get("quant_noise_gap_batches", 0))
    return _begin_valid_epoch(trainer, epoch)


def valid_step(trainer: Any, sample: Any, raise_oom: bool = False) -> Any:
    """Run Trainer.valid_step, and measure the gap on the same batch."""
    result = _valid_step(trainer, sample, raise_oom)
    gap = trainer.__dict__.get("quant_noise_gap")
    if gap is not None:
        gap.step(sample)
    return result


def consolidate_optimizer(trainer: Any) -> Any:
    """Calibrate inputs and check codes that train, then run Trainer.consolidate_optimizer.

    Every rank calls it before the first one saves.
    """
    input_ranges.calibrate(trainer)
    check_codes(trainer)
    sharded.gather(trainer)
    return _consolidate_optimizer(trainer)


def save_checkpoint(trainer: Any, filename: str, extra_state: dict[str, Any]) -> Any:
    """Run Trainer.save_checkpoint with the state of noise and data, checksums of codes, and layers in the options."""
    model, options = trainer.get_model(), trainer.cfg.model
    record_layers(model, options)
    extra_state = {**extra_state, POSITION: resume.state(trainer), **ema.state(trainer)}
    codes = checksums(model.state_dict())
    if codes:
        extra_state = {**extra_state, CHECKSUMS: codes, SHAPES: code_shapes(model)}
    noise = noise_of(model)
    if noise is not None:
        extra_state = {**extra_state, NOISE: noise.state_dict()}
    with saved_as_stock(model, options):
        return _save_checkpoint(trainer, filename, extra_state)


def load_checkpoint(
    trainer: Any,
    filename: str,
    reset_optimizer: bool = False,
    reset_lr_scheduler: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run Trainer.load_checkpoint; a run that resumes takes the state of noise and data, a new run does not."""
    own = resume.is_own(trainer, filename)
    layers = getattr(trainer.get_model(), "quant_noise_layers", None)
    if layers is not None:
        layers.own_checkpoint = own
    if own and trainer.cfg.checkpoint.restore_file == "checkpoint_last.pt" and not trainer.checkpoint_suffix:
        filename = newest_whole(filename)
    with exits_on_user_error(), ema.left_out(trainer):
        if own:
            check_same(trainer, filename)
        resume.check_given(trainer, filename, has_stages(trainer))
        extra_state = _load(trainer, filename, reset_optimizer, reset_lr_scheduler, *args, **kwargs)
    sharded.divide_moments(trainer)
    ema.load(trainer, extra_state)
    if extra_state is None or reset_optimizer:
        return extra_state
    if not trainer.cfg.checkpoint.reset_dataloader:
        if not reset_lr_scheduler:
            resume.load_schedule(trainer, extra_state)
        resume.load(trainer, extra_state)
    noise = noise_of(trainer.get_model())
    if noise is not None and NOISE in extra_state:
        noise.load_state_dict(extra_state[NOISE])
    if not has_stages(trainer):  # else when the state of the stages is known
        resume.end_if_complete(trainer, filename)
    return extra_state


def _load(trainer: Any, filename: str, *args: Any, **kwargs: Any) -> Any:
    """Run Trainer.load_checkpoint; where its error hides how architectures differ, raise a UserError that says how."""
    try:
        with state_by_name(trainer):
            return _load_checkpoint(trainer, filename, *args, **kwargs)
    except Exception as error:
        mismatch = mismatch_in(error)
        if mismatch is None:
            raise
        raise UserError(f"{filename}: {mismatch}") from None


def reduce_and_log_stats(trainer: Any, logging_outputs: Any, sample_size: Any, grad_norm: Any = None) -> Any:
    """Run Trainer._reduce_and_log_stats for an update (with `grad_norm`) or a validation batch, and log progress."""
    result = _reduce_and_log_stats(trainer, logging_outputs, sample_size, grad_norm)
    log_progress(trainer, training=grad_norm is not None)
    drop_unmeasured()
    return result


def catalog_shared_params(module: Any, memo: Any = None, prefix: str = "") -> Any:
    """List tied parameters for the Trainer to tie again, as fairseq does, without quantized weights and shared layers.

    The Trainer logs a line for each; layers stay tied where they are. The holders of a quantized weight
    share the whole of it, which stays shared; and its parts cannot be set from outside.
    """
    shared = _catalog_shared_params(module, memo, prefix)
    if memo is not None:  # a call within the recursion
        return shared
    with exits_on_user_error():
        check_noise(module)
    held = {name for name, _ in module.named_parameters(remove_duplicate=False)}  # an absent bias is no parameter
    shared = [paths for paths in shared if paths[0] in held]
    shared = [paths for paths in shared if len({_LAYER.sub("", path) for path in paths}) > 1]  # leave shared layers out
    inside = {
        f"{name}." for name, part in module.named_modules(remove_duplicate=False) if isinstance(part, QuantizedWeight)
    }
    return [paths for paths in shared if not paths[0].startswith(tuple(inside))] if inside else shared
