"""Run iPQ inside fairseq's Trainer in the stages of `--quantization-config-path PLAN`.

fairseq calls its Quantizer at the start of an epoch and after every update; this one takes its place. At its first
call it quantizes the weights of the plan's first stage, then fine-tunes for that stage's updates, and so on. Unlike in
fairseq's own, stages need not divide --max-update, the optimizer and the schedule continue across a stage, the state is
in the checkpoint, ties stay tied, and the ranks share the k-means of the weights.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import fairseq.quantization_utils
import torch
from fairseq.file_io import PathManager
from torch import Tensor

from ...accounting import MIB
from ...artifact.reader import is_packed
from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.keys import IMPORTANCE, STAGES
from ...errors import UserError
from ...layers import warn_of_unrounded
from ...layers.batch_statistics import batch_norms, estimating
from ...plan.plan import Plan
from ...quantization.feedback import Feedback, feeds_back, measuring_inputs
from ...quantization.importance import follow, sound
from ...quantization.quantize import quantize_inputs, quantize_targets, quantized_state
from ...quantization.table import Table, make_table
from ...quantization.targets import Target, resolve_stages
from ...utils.ranks import check_same, gather, rank_and_world
from .. import sharded
from ..batches import FIRST_BATCHES, first_batches
from ..exits import exits_on_user_error
from ..gradients import squared_gradients
from ..models.equivalents import cure
from ..models.quantizable import Quantizable, attach_and_say
from .best_so_far import start_anew
from .codes import encode_after_update
from .endings import watch_end
from .optimizer import adam_moments, carry_over
from .resume import end_if_complete
from .stage_schedule import restart_in_stages
from .stage_times import EPOCH, UPDATE, StageTimes

logger = logging.getLogger(__name__)


class StageController:
    """Takes the place of `fairseq.quantization_utils.Quantizer`, with the calls that fairseq's Trainer makes."""

    def __init__(self, config_path: str, max_epoch: int, max_update: int) -> None:
        with exits_on_user_error():
            self.plan = Plan.of(config_path)
        self.max_epoch, self.max_update = max_epoch, max_update
        self.done = 0  # stages quantized so far
        self.importance: dict[str, Tensor] = {}  # squared gradients of weights still to be quantized; bfloat16, CPU
        self.epoch = 1
        self.loading = False
        self.schedule_is_reset = False  # a stage is in progress, and its learning-rate schedule was not loaded

    @property
    def to_come(self) -> int:
        """The number of stages that have not begun."""
        return len(self.plan.stages) - self.done

    @property
    def next_stage(self) -> str:
        """The first stage that has not begun, for messages."""
        return f"stage {self.done + 1} of {len(self.plan.stages)}"

    def set_trainer(self, trainer: Any) -> None:
        """Check the plan against the model, before any training, and hook into checkpoints.

        Raises:
            UserError: the plan does not fit the options or the model, or the teacher cannot be loaded (in fairseq's
                programs SystemExit, after one line).
        """
        self.trainer = trainer
        model = trainer.get_model()
        with exits_on_user_error():
            self.plan = _with_options(self.plan, trainer.cfg.criterion)
            self.times = StageTimes(self.plan, self.max_epoch, self.max_update)
            _check_trainer(trainer, self.plan)
            if self.plan.structure is not None:
                model.restructure(self.plan.structure, trainer.cfg.model)
            if self.plan.noise:
                attach_and_say(model, self.plan.noise)
            if self.plan.stages and self.plan.tuning.restarts:
                restart_in_stages(trainer)
            load_teacher = getattr(trainer.get_criterion(), "load_teacher", None)
            if load_teacher is not None:  # a missing teacher stops the run now, not after the first k-means
                load_teacher()
            self.targets = resolve_stages(self.plan, model)
            self.table = make_table(model, self.targets, dense_bits=self.plan.dense.bits)
            trainer.get_criterion().dense_bits = self.plan.dense.bits  # for the sizes in the log
        _log_table(self.table)
        self._save, self._load = trainer.save_checkpoint, trainer.load_checkpoint
        trainer.save_checkpoint = self._save_checkpoint
        trainer.load_checkpoint = self._load_checkpoint
        if self.plan.stages:
            watch_end(trainer)

    def begin_epoch(self, epoch: int) -> None:
        """Called by the Trainer as an epoch (from 1) begins."""
        self.epoch = epoch
        if self.times.origin is None and self.times.unit == EPOCH:
            self._begin(epoch - 1)
        if self.schedule_is_reset:
            self.schedule_is_reset = False
            self._restart_schedule(self.done - 1)
            self.trainer.lr_step_update()
        self._advance(epoch - 1 if self.times.unit == EPOCH else self.trainer.get_num_updates())

    def _begin(self, now: int) -> None:
        """The first stage starts at this update (or epoch): refuse what cannot be done from here on."""
        with exits_on_user_error():
            if self.times.origin is None:
                self.times.begin(now)
            self.times.check(self.done, getattr(self.trainer.cfg.lr_scheduler, "warmup_updates", 0))

    def step_update(self, num_updates: int) -> None:
        """Called by the Trainer after every update."""
        if self.loading:
            return
        if self.plan.codes.train and self.done:
            interval = self.trainer.cfg.common.log_interval
            encode_after_update(self.trainer.get_model(), self.plan.codes, num_updates, interval)
        if self.times.unit == UPDATE:
            self._advance(num_updates)

    def _advance(self, now: int) -> None:
        first, due = self.done + 1, self.times.due(now)
        if first > due:
            return
        with exits_on_user_error():
            while self.done < due:
                self._quantize_stage(self.done)
                self.done += 1
            self._rebuild_optimizer(first)

    def _quantize_stage(self, stage: int) -> None:
        targets = [t for t in self.targets if t.stage == stage]
        if stage == 0 and self.plan.weighs and not self.importance:
            moments = adam_moments(self.trainer.get_model(), self.trainer.optimizer)
            self._weigh_by(moments, "the second moments of Adam in this training")
        if stage == 0 and self.plan.weighs and not self.importance:
            self._weigh_by(_gradients(self.trainer, self.epoch), f"the gradients of {FIRST_BATCHES} batches")
        where = self.next_stage
        logger.info(f"{where}: quantizing {len(targets)} weights, '{self.plan.stages[stage].match}'")
        started = time.perf_counter()
        quantize_targets(
            targets,
            seed=self.trainer.cfg.common.seed,
            importance=self.importance,
            codes=self.plan.codes,
            feedback=self._feedback(targets) if self.plan.encode.feeds_back else None,
            where=f"{where} ",
        )
        for target in targets:
            self.importance.pop(target.weight.tensor_name, None)
        check_same(quantized_state(self.trainer.get_model()), f"after {where}")
        if self.plan.activations is not None:
            warn_of_unrounded(self.trainer.get_model(), (t.weight.name for t in targets))
            quantize_inputs(self.trainer.get_model(), self.plan.activations, targets)
        if batch_norms(self.trainer.get_model()):  # or validation sees those of the weights before for long
            with estimating(self.trainer.get_model()):
                for sample in first_batches(self.trainer, self.epoch):
                    self.trainer.get_model()(**sample["net_input"])
        logger.info(f"{where}: quantized in {time.perf_counter() - started:.1f} s")

    def _feedback(self, targets: Sequence[Target]) -> Feedback | None:
        """Measure the inputs of the stage's weights on the first batches, the same ones on every rank.

        None where the stage has no product that error feedback is for, as one of an embedding alone.
        """
        model, encode = self.trainer.get_model(), self.plan.encode
        with measuring_inputs(model, [t.weight.name for t in targets if feeds_back(t)]) as inputs:
            for sample in first_batches(self.trainer, self.epoch, encode.batches):
                model(**sample["net_input"])
        if not inputs:
            logger.info(f"note: without error feedback in {self.next_stage}, where no product's inputs were measured")
        return Feedback(inputs, encode.damping) if inputs else None

    def _weigh_by(self, moments: Mapping[str, Tensor], what: str) -> None:
        """Keep what k-means needs of the moments, if there are any: the dense network's, for all stages."""
        found = sound(moments, self._dense())
        if found:
            self.importance = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in found.items()}
            logger.info(f"k-means weighs errors by {what}")

    def _dense(self) -> dict[str, Tensor]:
        """The weights that k-means will quantize, by name."""
        stored = {t.weight.tensor_name: t.weight.parameter for t in self.targets if t.block_size is not None}
        return {name: weight for name, weight in stored.items() if isinstance(weight, Tensor)}

    def _rebuild_optimizer(self, first: int) -> None:
        """A new optimizer for the new parameters, with the old one's memory; the schedule is as the plan says.

        `first` is the stage, from 1, that has begun: the first one where several have.
        """
        trainer = self.trainer
        optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
        trainer.reinitialize()
        carry_over(optimizer, trainer.optimizer)
        if self.plan.tuning.restarts:
            self._restart_schedule(self.done - 1)
        else:
            trainer.lr_scheduler.load_state_dict(scheduler.state_dict())
        start_anew(trainer, first)
        trainer.lr_step_update()

    def _restart_schedule(self, stage: int) -> None:
        """The learning rates of a run of its own for what is left of a stage."""
        now = self.trainer.get_num_updates()
        left = self.times.left(stage, now)
        self.trainer.lr_scheduler.begin(now, self.epoch, None if left is None else max(left, 1))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the model: the plan, the stages done, where they start."""
        return {"plan": self.plan.to_dict(), "done": self.done, **self.times.state_dict()}

    def _save_checkpoint(self, filename: str, extra_state: dict[str, Any]) -> Any:
        if self.plan.stages:
            extra_state = {**extra_state, STAGES: self.state_dict()}
        if self.importance:
            extra_state = {**extra_state, IMPORTANCE: self.importance}
        return self._save(filename, extra_state)

    def _load_checkpoint(
        self,
        filename: str,
        reset_optimizer: bool = False,
        reset_lr_scheduler: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self.loading = True  # the Trainer reports the checkpoint's update before the state below is read
        try:
            extra_state = self._load(filename, reset_optimizer, reset_lr_scheduler, *args, **kwargs)
        finally:
            self.loading = False
        state = (extra_state or {}).get(STAGES)
        with exits_on_user_error():
            if state is not None and state["plan"]["stages"]:  # else a plan of noise alone trained it
                self._resume(filename, state, reset_optimizer)
                reset = reset_optimizer or reset_lr_scheduler
                self.schedule_is_reset = reset and self.plan.tuning.restarts and self.done > 0
                self.importance = sound(extra_state.get(IMPORTANCE), self._dense())
            elif extra_state is not None and reset_optimizer and self.plan.weighs:
                moments = _moments_in_file(filename, self.trainer.get_model())
                self._weigh_by(moments, f"the second moments of Adam in {filename}")
        if self.times.unit == UPDATE or self.times.origin is not None:
            self._begin(self.trainer.get_num_updates())
        if extra_state is not None and not reset_optimizer and self.plan.stages and not self.to_come:
            end_if_complete(self.trainer, filename)
        return extra_state

    def _resume(self, filename: str, state: dict[str, Any], reset: bool) -> None:
        before = Plan.of(state["plan"])
        if before.stages != self.plan.stages:
            raise UserError(
                f"{filename}: was trained with other stages than this plan's; give --quantization-config-path the plan "
                "it started with, or --restore-file a dense checkpoint"
            )
        if before.codes.train != self.plan.codes.train:
            raise UserError(
                f"{filename}: was trained with codes: {before.codes.kind}, and the plan or --ipq-codes says "
                f"{self.plan.codes.kind}; give what it started with, or --restore-file a dense checkpoint"
            )
        check_same(quantized_state(self.trainer.get_model()), f"loaded from {filename}")
        self.done = state["done"]
        self.times.load_state_dict(state)
        if reset and self.done:  # updates count from 0 again: the stage in progress begins now
            self.times.origin = -self.times.starts[self.done - 1]
        self.trainer._wrapped_model = None  # a DDP wrapper from before holds the dense parameters


def _moments_in_file(filename: str, model: Any) -> dict[str, Tensor]:
    """Those that the checkpoint holds from which the model was loaded; rank 0 reads it, as for the loading."""
    found: dict[str, Tensor] = {}
    if rank_and_world()[0] == 0 and not is_packed(filename):
        checkpoint = Checkpoint(PathManager.get_local_path(filename))
        taken = model.quant_noise_layers.taken(model, checkpoint.weights)
        found = follow(checkpoint.moments, checkpoint.weights, taken)
    of_rank: list[dict[str, Tensor]] = gather(found)
    return of_rank[0]


def _gradients(trainer: Any, epoch: int) -> dict[str, Tensor]:
    """Squared gradients on the first batches of the training data; a rank's own, which encodes its own share."""
    scale = getattr(getattr(trainer.optimizer, "scaler", None), "loss_scale", 1.0)
    return squared_gradients(trainer.get_model(), trainer.get_criterion(), first_batches(trainer, epoch), scale)


def _with_options(plan: Plan, options: Any) -> Plan:
    """The plan, with what `--ipq-codes`, `--ipq-codes-lr`, `--ipq-stages` and `--ipq-encode` say in its place.

    Raises:
        UserError: an option has an unknown value.
    """
    names = ("codes", "codes_lr", "stages", "encode")
    kind, factor, stages, encode = (getattr(options, f"ipq_{name}", None) for name in names)
    if kind is not None:
        plan = replace(plan, codes=replace(plan.codes, kind=kind))
    if factor is not None:
        plan = replace(plan, codes=replace(plan.codes, learning_rate=factor))
    if stages is not None:
        plan = replace(plan, tuning=replace(plan.tuning, stages=stages))
    if encode is not None:
        plan = replace(plan, encode=replace(plan.encode, kind=encode))
    return plan


def _check_trainer(trainer: Any, plan: Plan) -> None:
    if not isinstance(trainer.get_model(), Quantizable):
        name = getattr(trainer.cfg.model, "_name", None) or "this model"
        raise UserError(f"--quantization-config-path: {name} cannot hold quantized weights; {cure(name)}")
    int8 = bool(getattr(trainer.cfg.model, "quant_noise_scalar", 0))
    if int8 and plan.stages:
        raise UserError(
            "--quant-noise-scalar makes every weight int8, and the plan has stages; give --quant-noise-pq P "
            "--quant-noise-kind int8 for the noise alone, or leave the stages out"
        )
    if trainer.cfg.ema.store_ema and plan.stages:
        raise UserError("--store-ema: the average cannot follow weights that turn into codes; leave it out of iPQ")
    if trainer.cfg.distributed_training.ddp_backend == sharded.BACKEND and (plan.stages or plan.activations):
        raise UserError("--ddp-backend fully_sharded: iPQ needs whole weights; use legacy_ddp")


def _log_table(table: Table) -> None:
    info = table.to_dict()
    logger.info(
        f"plan: {table.parameters:,} parameters, {table.dense_bytes / MIB:.2f} MiB dense, "
        f"{table.paper_bytes / MIB:.2f} MiB quantized (x{info['ratio']:.1f})"
    )


def quantize_model_scalar(model: Any, model_cfg: Any) -> Any:
    """fairseq replaces layers by its own int8 ones for `--quant-noise-scalar`; the models of this package need none."""
    return model if isinstance(model, Quantizable) else _fairseq_quantize_model_scalar(model, model_cfg)


_fairseq_quantize_model_scalar = fairseq.quantization_utils.quantize_model_scalar
