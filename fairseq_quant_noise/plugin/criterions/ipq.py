"""Provide `--criterion ipq`: wrap any fairseq criterion, log the model's size and distil from a teacher.

loss = (1 - w) * criterion + w * KL(teacher || student)        w = --ipq-distillation-weight, 0 without a teacher

With `regression_target` the squared error takes the place of KL. A teacher works with the criteria in DISTILLED: they
call the model once, and it returns a distribution over words or classes, or a number, for each target.
"""

import inspect
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq import checkpoint_utils
from fairseq.criterions import (
    CRITERION_DATACLASS_REGISTRY,
    CRITERION_REGISTRY,
    FairseqCriterion,
    register_criterion,
)
from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.utils import merge_with_parent
from fairseq.file_io import PathManager
from fairseq.logging import metrics
from omegaconf import II, OmegaConf
from torch import nn

from ...accounting import MIB
from ...checkpoints.options import SHARED
from ...errors import UserError
from ...quantization.table import model_bytes
from ..distillation import Recorder, distillation_loss
from ..exits import exits_on_user_error

SIZE = ("ipq_mib", "ipq_ratio")  # in the log
DISTILLED = (
    *("cross_entropy", "label_smoothed_cross_entropy", "label_smoothed_cross_entropy_with_alignment", "adaptive_loss"),
    *("masked_lm", "sentence_prediction", "sentence_prediction_adapters"),
)


@dataclass
class IPQCriterionConfig(FairseqDataclass):
    """Options of `ipq`."""

    ipq_criterion: str = field(
        default="cross_entropy", metadata={"help": "the fairseq criterion to wrap, such as adaptive_loss"}
    )
    ipq_criterion_options: str = field(
        default="{}", metadata={"help": 'its options, as JSON, such as {"label_smoothing": 0.1}'}
    )
    ipq_teacher: Optional[str] = field(  # noqa: UP045 (fairseq reads `Optional`, not `| None`)
        default=None, metadata={"help": "checkpoint of the uncompressed model to distil from"}
    )
    ipq_distillation_weight: float = field(
        default=0.5, metadata={"help": "share of the distillation in the loss, from 0 to 1, when there is a teacher"}
    )
    ipq_codes: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "fixed or train, in place of the plan's `codes`"}
    )
    ipq_codes_lr: Optional[float] = field(  # noqa: UP045
        default=None, metadata={"help": "learning rate of the weights behind trained codes, a factor of --lr"}
    )
    ipq_stages: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "in-turn or joint, in place of the plan's `tuning: {stages: ...}`"}
    )
    ipq_encode: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "plain or feedback (error feedback), in place of the plan's `encode`"}
    )
    classification_head_name: str = field(
        default="sentence_classification_head", metadata={"help": "as in sentence_prediction, whose task asks for it"}
    )
    regression_target: bool = field(default=False, metadata={"help": "as in sentence_prediction"})
    sentence_avg: bool = II("optimization.sentence_avg")


@register_criterion("ipq", dataclass=IPQCriterionConfig)
class IPQCriterion(FairseqCriterion):
    """Wraps `inner`; `build_criterion` makes a subclass per wrapped criterion, since fairseq calls class methods."""

    inner_class: type[FairseqCriterion]
    dense_bits = 32  # of a number without codes, in the sizes of the log; a training sets what its plan says

    def __init__(self, task: Any, inner: FairseqCriterion, teacher_path: str | None, weight: float) -> None:
        super().__init__(task)
        self.inner = inner
        self.teacher_path = teacher_path
        self.teachers: list[nn.Module] = []  # in a list: not a part of what is trained
        self.weight = weight

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> "IPQCriterion":
        """Build the wrapped criterion with its own options. The teacher is loaded when training asks for it.

        Raises:
            UserError: `--ipq-criterion` cannot be wrapped, its options do not fit it, or the distillation weight is
                not from 0 to 1 (in fairseq's programs SystemExit, after one line).
        """
        with exits_on_user_error():
            inner = _build_inner(cfg, task)
            if not 0 <= cfg.ipq_distillation_weight <= 1:
                raise UserError(f"--ipq-distillation-weight is {cfg.ipq_distillation_weight}; give 0 to 1")
        summed = staticmethod(type(inner).logging_outputs_can_be_summed)
        wrapper = type(
            f"IPQ{type(inner).__name__}",
            (cls,),
            {"inner_class": type(inner), "logging_outputs_can_be_summed": summed},
        )
        made: IPQCriterion = wrapper(task, inner, cfg.ipq_teacher, cfg.ipq_distillation_weight)
        return made

    def forward(self, model: Any, sample: Any, reduce: bool = True) -> tuple[Any, Any, dict[str, Any]]:
        """Compute (loss, sample size, logging output), as any criterion; validation reports the wrapped loss alone.

        Raises:
            UserError: the task's batches lack what the wrapped criterion reads, or the teacher cannot be loaded (in
                fairseq's programs SystemExit, after one line).
        """
        recorder = Recorder(model)
        with exits_on_user_error(), _fits(self.inner, sample):
            loss, sample_size, logging_output = self.inner(recorder, sample, reduce=reduce)
        if self.training and self.teacher_path and self.weight > 0:
            regression = getattr(self.inner, "regression_target", False)
            distilled = distillation_loss(recorder, self._teacher(model), sample, self.padding_idx, regression)
            logging_output["ipq_distillation"] = distilled.data
            loss = (1 - self.weight) * loss + self.weight * distilled
        now, dense = model_bytes(model, self.dense_bits)
        logging_output |= {"ipq_mib": now / MIB, "ipq_ratio": dense / now, "ipq_forwards": 1}
        return loss, sample_size, logging_output

    def load_teacher(self) -> None:
        """Read the teacher's checkpoint, once; without --ipq-teacher nothing happens. Evaluation never needs it.

        Raises:
            UserError: the wrapped criterion cannot be distilled, or the checkpoint does not exist or does not fit the
                task (in fairseq's programs SystemExit, after one line).
        """
        if self.teacher_path and not self.teachers:
            with exits_on_user_error():
                _check_distillation(type(self.inner))
                self.teachers.append(_load_teacher(self.teacher_path, self.task))

    def _teacher(self, student: nn.Module) -> nn.Module:
        """The teacher, on the student's device and in its dtype: a half-precision Trainer casts the inputs of both."""
        self.load_teacher()
        teacher = self.teachers[0]
        first, theirs = next(teacher.parameters()), next(student.parameters())
        if (first.device, first.dtype) != (theirs.device, theirs.dtype):
            self.teachers[0] = teacher = teacher.to(theirs.device, theirs.dtype)
        return teacher

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """The wrapped criterion's metrics, and ipq_mib, ipq_ratio, ipq_distillation (bits a prediction).

        For a regression, ipq_distillation is the squared error per prediction over ln 2, as fairseq logs its `loss`.
        """
        cls.inner_class.reduce_metrics(logging_outputs)
        forwards = sum(log.get("ipq_forwards", 0) for log in logging_outputs)
        if forwards:
            mib, ratio = (sum(log.get(name, 0) for log in logging_outputs) / forwards for name in SIZE)
            log_size(float(mib), float(ratio))
        distilled = sum(log.get("ipq_distillation", 0) for log in logging_outputs)
        size = sum(log.get("sample_size", 0) for log in logging_outputs)
        if distilled and size:
            metrics.log_scalar("ipq_distillation", float(distilled / size / math.log(2)), size, round=3)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Replaced in `build_criterion`'s subclass by the wrapped criterion's answer."""
        return False


@contextmanager
def _fits(criterion: FairseqCriterion, sample: Any) -> Iterator[None]:
    """Inside, a KeyError for what the task's batches lack is a UserError that names the criterion."""
    try:
        yield
    except KeyError as error:
        key = error.args[0] if error.args else None
        if not isinstance(key, str) or key in sample:
            raise
        raise UserError(
            f"--ipq-criterion {_name(criterion)}: reads {key!r}, which the batches of this task do not have; give the "
            "criterion of the dense training, and its task"
        ) from error


def _name(criterion: FairseqCriterion) -> str:
    """The name under which the criterion is registered."""
    return next((name for name, kind in CRITERION_REGISTRY.items() if kind is type(criterion)), "")


def log_size(mib: float, ratio: float) -> None:
    """Log the network's size now, and the ratio of its dense size to that."""
    for name, value in zip(SIZE, (mib, ratio), strict=True):
        metrics.log_scalar(name, value, weight=0, priority=191, round=2)


def _build_inner(cfg: Any, task: Any) -> FairseqCriterion:
    name = cfg.ipq_criterion
    if name not in CRITERION_REGISTRY or name not in CRITERION_DATACLASS_REGISTRY or name == "ipq":
        known = ", ".join(sorted(set(CRITERION_DATACLASS_REGISTRY) - {"ipq"}))
        raise UserError(f"--ipq-criterion {name}: not a criterion that can be wrapped; known: {known}")
    try:
        options = json.loads(cfg.ipq_criterion_options)
        dataclass = CRITERION_DATACLASS_REGISTRY[name]
        shared = {key: cfg[key] for key in SHARED if key in dataclass.__dataclass_fields__}
        node = OmegaConf.create({**shared, **options, "_name": name})
        node.__dict__["_parent"] = cfg.__dict__["_parent"]  # so that ${optimization.…} resolves, as fairseq does it
        inner_cfg = merge_with_parent(dataclass(), node)
    except Exception as error:  # JSON, TypeError, and half a dozen of omegaconf's
        raise UserError(f"--ipq-criterion-options {cfg.ipq_criterion_options}: {str(error).splitlines()[0]}") from None
    inner: FairseqCriterion = CRITERION_REGISTRY[name].build_criterion(inner_cfg, task)
    return inner


def _check_distillation(inner: type[FairseqCriterion]) -> None:
    """Raise UserError for a criterion that is not known to have outputs comparable with a teacher's.

    Its outputs may not be distributions (features of speech, ranks), or not one per target (frames of CTC, two
    drop-outs of each sentence), so that the distillation loss would be wrong.
    """
    if inner not in [CRITERION_REGISTRY[name] for name in DISTILLED]:
        name = next((name for name, known in CRITERION_REGISTRY.items() if known is inner), inner.__name__)
        raise UserError(
            f"--ipq-teacher: does not go with --ipq-criterion {name}; leave the teacher out, or take one of "
            f"{', '.join(DISTILLED)}"
        )


def _load_teacher(path: str, task: Any) -> nn.Module:
    if not PathManager.exists(path):
        raise UserError(f"--ipq-teacher {path}: no such file; give the checkpoint of the uncompressed model")
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    _check_head(path, state["model"], task)  # before loading, which makes up a head that is missing
    try:
        load = inspect.unwrap(checkpoint_utils.load_model_ensemble_and_task)  # what goes wrong is said here
        models, *_ = load([path], task=task, state=state)
    except (AttributeError, RuntimeError) as error:
        name = getattr(state["cfg"].model, "_name", None) if state.get("cfg") else state["args"].arch
        line = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"--ipq-teacher {path}: this {name} does not fit the task and its dictionary ({line}); give the checkpoint "
            "of the uncompressed model, trained on the same data"
        ) from None
    teacher: nn.Module = models[0].eval()
    return teacher.requires_grad_(False)


def _check_head(path: str, weights: Mapping[str, Any], task: Any) -> None:
    """Raise UserError where the task needs a classification head that the teacher's checkpoint does not have."""
    head = getattr(task.cfg, "classification_head_name", None)
    if head is None:
        return
    bias = weights.get(f"classification_heads.{head}.out_proj.bias")  # a bias is dense in any checkpoint
    has = f"has {len(bias)} classes in" if bias is not None else "has no"
    if bias is None or len(bias) != task.cfg.num_classes:
        raise UserError(
            f"--ipq-teacher {path}: {has} classification head {head!r}, and the task wants {task.cfg.num_classes} "
            "classes; give the checkpoint of the uncompressed model, fine-tuned on this task"
        )
