"""List and install every name of fairseq that this package replaces; it is done nowhere else.

`install` puts them in place, as registration does; nothing else in the package assigns to a module or a class of
fairseq. A row is a fault in docs/upstream.md, or a promise of ours that fairseq has no hook for.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import fairseq.checkpoint_utils

from . import broadcast, data_parallel, literals, loading, mistakes, numpy_names, precision, saving, sharded, submission
from .models import any_model, layers
from .training import divergence, ema, half_precision, hooks, resume, stages


@dataclass(frozen=True)
class Patch:
    """One name of fairseq, and what stands in its place.

    Attributes:
        target: the dotted name.
        by: what replaces it.
        why: what goes wrong without it.
        row: of docs/upstream.md; None where fairseq is not at fault.
        original: what fairseq had there.
    """

    target: str
    by: Any
    why: str
    row: int | None = None
    original: Any = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "original", inspect.getattr_static(*self.place))

    @property
    def place(self) -> tuple[Any, str]:
        """The module or class that has the name, and the name in it."""
        path, _, name = self.target.rpartition(".")
        module, _, kind = path.rpartition(".")
        if kind.lstrip("_")[:1].isupper():  # a class
            return getattr(importlib.import_module(module), kind), name
        return importlib.import_module(path), name


def _of_half_precision() -> Iterator[Patch]:
    """The state of each class of optimizers; fairseq's own method, which ours calls, is bound before it is replaced."""
    why = "the fp32 copies of the weights and the loss scale are not in a checkpoint, so that no resume is exact"
    for kind in half_precision.OPTIMIZERS:
        for name, ours in (
            ("state_dict", half_precision.state_dict),
            ("load_state_dict", half_precision.load_state_dict),
        ):
            by = functools.partialmethod(ours, of_fairseq=getattr(kind, name))
            yield Patch(f"{kind.__module__}.{kind.__name__}.{name}", by, why, 6)


_TRAINER = "fairseq.trainer.Trainer"
_COMMAND = submission.leaves_error(mistakes.in_a_line(precision.call_main, is_program=True))
_LOADING = mistakes.in_a_line(fairseq.checkpoint_utils.load_model_ensemble_and_task, is_program=False)

PATCHES = (
    # reading and writing
    Patch(
        "fairseq.checkpoint_utils.load_checkpoint_to_cpu",
        loading.load_checkpoint_to_cpu,
        "checkpoints are unpickled whatever is in them, and packed files are not known",
        23,
    ),
    Patch(
        "fairseq.checkpoint_utils.load_model_ensemble_and_task",
        _LOADING,
        "a file that is missing or does not fit ends in a traceback",
    ),
    Patch(
        "fairseq.checkpoint_utils.prune_state_dict",
        layers.prune_state_dict,
        "layers to keep on one side lose those of the other",
        31,
    ),
    Patch(
        "fairseq.checkpoint_utils.torch_persistent_save",
        saving.torch_persistent_save,
        "a kill, or a full disk, leaves half a checkpoint under the name of a whole one",
    ),
    Patch(
        "fairseq.checkpoint_utils.PathManager",
        saving.WholeCopies,
        "the copies of a checkpoint, as checkpoint_best.pt, are cut by a kill in the same way",
    ),
    Patch(
        "fairseq.distributed.utils._broadcast_object_slow",
        broadcast.broadcast_object,
        "on several processes no checkpoint loads since torch 2.6",
        23,
    ),
    *(
        Patch(f"{module}.np", numpy_names.numpy, "names that numpy has removed")
        for module in (
            "fairseq.data.data_utils",
            "fairseq.data.language_pair_dataset",
            "fairseq.data.token_block_dataset",
            "fairseq.modules.dynamic_crf_layer",
        )
    ),
    # a program's start
    Patch(
        "fairseq.distributed.utils.call_main",
        _COMMAND,
        "--bf16 means a TPU, --fp16 a GPU; a missing folder or a full disk ends in a traceback",
    ),
    Patch(
        "fairseq.models.build_model",
        any_model.build_model,
        "fairseq's own noise destroys weights, and its models hold no codes: any of them becomes one of ours",
        38,
    ),
    Patch(
        "fairseq.options.parse_args_and_arch",
        any_model.parse_args_and_arch,
        "an architecture of fairseq's does not know the options of the noise",
        38,
    ),
    Patch(
        "fairseq.models.DistributedFairseqModel",
        data_parallel.distributed_fairseq_model,
        "the default --ddp-backend ends in a traceback on a CPU, and with LayerDrop",
        32,
    ),
    *(
        Patch(
            target, by, "fairscale, which does not run on a CPU and keeps noise from the weights, is replaced by torch"
        )
        for target, by in (
            ("fairseq_cli.train.fsdp_enable_wrap", sharded.enable_wrap),
            ("fairseq_cli.train.fsdp_wrap", sharded.wrap),
            (f"{_TRAINER}.is_fsdp", property(sharded.is_sharded)),
            (f"{_TRAINER}.clip_grad_norm", sharded.clip_grad_norm),
        )
    ),
    # the stages
    Patch("fairseq.quantization_utils.Quantizer", stages.StageController, "fairseq's iPQ: see the rows 4 to 13", 5),
    Patch(
        "fairseq.quantization_utils.quantize_model_scalar",
        stages.quantize_model_scalar,
        "layers are replaced by ones whose noise calls .cuda()",
        14,
    ),
    # the Trainer
    Patch(
        "fairseq.trainer._catalog_shared_params",
        hooks.catalog_shared_params,
        "a shared layer's weight is found once only for each of its names",
        22,
    ),
    Patch(f"{_TRAINER}.begin_epoch", hooks.begin_epoch, "noise by the epoch needs to know of it"),
    Patch(f"{_TRAINER}.begin_valid_epoch", hooks.begin_valid_epoch, "ranges, the gap and --patience begin anew there"),
    Patch(f"{_TRAINER}.valid_step", hooks.valid_step, "the gap is measured on the same batches"),
    Patch(f"{_TRAINER}._reduce_and_log_stats", hooks.reduce_and_log_stats, "sizes and distortions go to the log"),
    Patch(f"{_TRAINER}.consolidate_optimizer", hooks.consolidate_optimizer, "all ranks come by here before a save"),
    Patch(f"{_TRAINER}.save_checkpoint", hooks.save_checkpoint, "the state of noise and stages is to be saved", 6),
    Patch(f"{_TRAINER}.load_checkpoint", hooks.load_checkpoint, "the state of noise and stages is to be loaded", 6),
    Patch(f"{_TRAINER}.get_train_iterator", resume.get_train_iterator, "another number of processes skips data", 6),
    Patch(f"{_TRAINER}.train_step", divergence.train_step, "a loss that is NaN trains on, or ends without a name"),
    Patch("fairseq.trainer.NanDetector", divergence.leave, "its report of a NaN is a page, and repeats the step"),
    Patch("fairseq.trainer.build_ema", ema.build_ema, "--store-ema copies noise and codes as if they were weights"),
    *_of_half_precision(),
)


def install() -> None:
    """Put everything in fairseq's place; a second call changes nothing."""
    for patch in PATCHES:
        setattr(*patch.place, patch.by)
    for name, module in [*sys.modules.items()]:
        if name.partition(".")[0] in ("fairseq", "fairseq_cli") and isinstance(module, type(sys)):
            vars(module).setdefault("eval", literals.evaluate)  # row 23: an option in a checkpoint would run as code
