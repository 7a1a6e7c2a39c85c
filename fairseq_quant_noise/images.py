"""Prepare images for a network with torchvision: augment them in training, crop them in evaluation, normalise."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from .errors import UserError
from .networks.vision import import_vision

if TYPE_CHECKING:
    from PIL.Image import Image

#: By name the mean and the standard deviation, by channel, of pixels from 0 to 1: ImageNet's own; and those of networks
#: from TensorFlow, such as EfficientNet-Lite, which see pixels from -1 to 1.
NORMALIZATIONS = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "inception": ((0.5,) * 3, (0.5,) * 3)}
Transform = Callable[["Image"], Tensor]  # from a PIL image to a (3, size, size) tensor
AUGMENTATIONS = ("imagenet", "randaugment", "cifar", "none")


def training_transform(
    size: int, augmentation: str = "imagenet", crop: float = 0.875, normalization: str = "imagenet"
) -> Transform:
    """A random transform from a PIL image to a normalised (3, size, size) tensor.

    Args:
        size: in pixels.
        augmentation: imagenet (a random part of the image, resized, and flips), randaugment (the same and two
            operations of RandAugment, arXiv 1909.13719), cifar (a shift by up to an eighth, and flips), or none.
        crop: for augmentation none, as in `evaluation_transform`.
        normalization: as in `evaluation_transform`.

    Raises:
        UserError: there is no such augmentation or normalization, or torchvision is not installed.
    """
    t = import_vision("torchvision.transforms")
    if augmentation not in AUGMENTATIONS:
        raise UserError(f"--augmentation is {augmentation!r}; give one of {', '.join(AUGMENTATIONS)}")
    if augmentation == "none":
        return evaluation_transform(size, crop, normalization)
    if augmentation == "cifar":
        steps = [t.Resize((size, size)), t.RandomCrop(size, padding=size // 8), t.RandomHorizontalFlip()]
    else:
        steps = [t.RandomResizedCrop(size, interpolation=t.InterpolationMode.BICUBIC), t.RandomHorizontalFlip()]
    if augmentation == "randaugment":
        steps.append(t.RandAugment(num_ops=2, magnitude=9))
    return t.Compose([*steps, t.ToTensor(), _normalize(normalization)])


def _normalize(name: str) -> Transform:
    if name not in NORMALIZATIONS:
        raise UserError(f"--normalization is {name!r}; give one of {', '.join(NORMALIZATIONS)}")
    transform: Transform = import_vision("torchvision.transforms").Normalize(*NORMALIZATIONS[name])
    return transform


def evaluation_transform(size: int, crop: float = 0.875, normalization: str = "imagenet") -> Transform:
    """A transform from a PIL image to the normalised (3, size, size) tensor of its centre.

    Args:
        size: in pixels.
        crop: the side of the centre as a share of the image's shorter side.
        normalization: imagenet (the mean and standard deviation of ImageNet) or inception (pixels from -1 to 1).

    Raises:
        UserError: there is no such normalization, or torchvision is not installed.
    """
    t = import_vision("torchvision.transforms")
    resize = t.Resize(round(size / crop), interpolation=t.InterpolationMode.BICUBIC)
    return t.Compose([resize, t.CenterCrop(size), t.ToTensor(), _normalize(normalization)])
