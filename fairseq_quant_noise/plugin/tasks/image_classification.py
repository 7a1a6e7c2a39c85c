# ruff: noqa: UP045 (fairseq reads `Optional`, not `| None`)
"""Provide `--task image_classification` on a tree of images: DATA/train/CLASS/IMAGE and DATA/val/CLASS/IMAGE."""

import logging
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.logging import metrics
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II, MISSING

from ...errors import UserError
from ...images import AUGMENTATIONS, NORMALIZATIONS, evaluation_transform, training_transform
from ...networks.timm_weights import load_timm_weights
from ..distillation import Recorder
from ..exits import exits_on_user_error
from .image_dataset import ImageDataset, class_names, split_folder

logger = logging.getLogger(__name__)

TOP = (1, 5)  # accuracies that validation logs, in percent: top1, top5
_Augmentation: Any = ChoiceEnum(AUGMENTATIONS)
_Normalization: Any = ChoiceEnum(list(NORMALIZATIONS))


@dataclass
class ImageClassificationConfig(FairseqDataclass):
    """Options of `image_classification`."""

    data: str = field(default=MISSING, metadata={"help": "folder with train/CLASS/IMAGE and val/CLASS/IMAGE"})
    image_size: int = field(default=224, metadata={"help": "height and width in pixels; EfficientNet-B3 has 300"})
    crop_ratio: float = field(
        default=0.875, metadata={"help": "evaluation sees the middle of the image: this share of its shorter side"}
    )
    augmentation: _Augmentation = field(
        default="imagenet",
        metadata={"help": "imagenet: random parts, flips; randaugment: and RandAugment; cifar: moves, flips; none"},
    )
    normalization: _Normalization = field(
        default="imagenet", metadata={"help": "imagenet: its mean and deviation; inception: pixels from -1 to 1 (Lite)"}
    )
    timm_weights: Optional[str] = field(
        default=None, metadata={"help": "file with weights of timm's EfficientNet to start from (.pth, .safetensors)"}
    )
    seed: int = II("common.seed")


@register_task("image_classification", dataclass=ImageClassificationConfig)
class ImageClassificationTask(FairseqTask):
    """One class for each image. Any criterion of logits and a target works: cross_entropy, label_smoothed_…, ipq.

    Args:
        cfg: the options.
        classes: the names of the classes, in the order of the network's outputs.
    """

    cfg: ImageClassificationConfig

    def __init__(self, cfg: ImageClassificationConfig, classes: list[str]) -> None:
        super().__init__(cfg)
        self.classes = classes
        self.known = bool(classes)  # from the data; a checkpoint's may replace them

    @classmethod
    def setup_task(cls, cfg: ImageClassificationConfig, **kwargs: Any) -> "ImageClassificationTask":
        """Set up the task with the classes of the training split or, if there is none, of the validation split.

        Raises:
            UserError: the image size or the crop ratio is out of range, or the data has no folders of classes (in
                fairseq's programs SystemExit, after one line).
        """
        with exits_on_user_error():
            if not 0 < cfg.crop_ratio <= 1 or cfg.image_size < 1:
                raise UserError(
                    f"--image-size {cfg.image_size} --crop-ratio {cfg.crop_ratio}: give pixels, and a share up to 1"
                )
            return cls(cfg, _classes_of(cfg.data) if cfg.data else [])

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        """Build the model as fairseq does; a training starts from timm's weights where the options name a file."""
        with exits_on_user_error():
            model = super().build_model(cfg, from_checkpoint)
            if self.cfg.timm_weights and not from_checkpoint:
                load_timm_weights(model, self.cfg.timm_weights)
                logger.info(f"weights of timm's from {self.cfg.timm_weights}")
        return model

    def load_dataset(self, split: str, combine: bool = False, task_cfg: Any = None, **kwargs: Any) -> None:
        """Read the names of a split's images; `train` is shuffled and augmented."""
        cfg, train = self.cfg, split == "train"
        normalization = str(cfg.normalization)
        with exits_on_user_error():
            if train:
                transform = training_transform(cfg.image_size, str(cfg.augmentation), cfg.crop_ratio, normalization)
            else:
                transform = evaluation_transform(cfg.image_size, cfg.crop_ratio, normalization)
            folder = split_folder(cfg.data, split)
            self.datasets[split] = ImageDataset(folder, self.classes, transform, shuffle=train, seed=cfg.seed)

    def get_batch_iterator(self, *args: Any, num_workers: int = 0, data_buffer_size: int = 0, **kwargs: Any) -> Any:
        """Iterate as fairseq does; without workers this thread reads the images, as threads share random numbers."""
        size = data_buffer_size if num_workers else 0
        return super().get_batch_iterator(*args, num_workers=num_workers, data_buffer_size=size, **kwargs)

    def valid_step(self, sample: Any, model: Any, criterion: Any) -> tuple[Any, Any, dict[str, Any]]:
        """Validate as fairseq does, and count the images whose class is among the best k."""
        recorder = Recorder(model)
        loss, sample_size, logging_output = super().valid_step(sample, recorder, criterion)
        target = sample["target"]
        best = recorder.output.topk(min(max(TOP), recorder.output.shape[-1]), dim=-1).indices  # (N, 5)
        hit = best == target.unsqueeze(-1)
        counts = {f"n_top{k}": hit[:, :k].sum().to(torch.float) for k in TOP}
        return loss, sample_size, {**logging_output, **counts, "n_images": len(target)}

    def reduce_metrics(self, logging_outputs: Any, criterion: Any) -> None:
        """Log fairseq's metrics, and top1 and top5 in percent where validation has counted them."""
        super().reduce_metrics(logging_outputs, criterion)
        images = sum(log.get("n_images", 0) for log in logging_outputs)
        for k in TOP if images else ():
            right = sum(float(log.get(f"n_top{k}", 0)) for log in logging_outputs)
            metrics.log_scalar(f"top{k}", 100 * right / images, images, round=2)

    def state_dict(self) -> dict[str, Any]:
        """The names of the classes, which go into checkpoints and packed files."""
        return {"classes": list(self.classes)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the classes of a checkpoint.

        Raises:
            UserError: the data has a class that the checkpoint does not know (in fairseq's programs SystemExit, after
                one line).
        """
        found = state_dict.get("classes")
        trained = found if isinstance(found, list) and all(isinstance(name, str) for name in found) else self.classes
        unknown = [name for name in self.classes if name not in trained]
        with exits_on_user_error():
            if unknown:
                raise UserError(
                    f"{self.cfg.data}: has a class {unknown[0]!r}, and the checkpoint's {len(trained)} classes do not; "
                    "give the data that it was trained on"
                )
        self.classes = trained

    def max_positions(self) -> None:
        """Images have no length."""
        return

    @property
    def source_dictionary(self) -> None:
        """Images have no words."""
        return

    @property
    def target_dictionary(self) -> None:
        """Classes are no words."""
        return


def _classes_of(data: str) -> list[str]:
    try:
        return class_names(split_folder(data, "train"))
    except UserError:
        return class_names(split_folder(data, "valid"))
