"""Prepare images for a network with torchvision: augment them in training, crop them in evaluation, normalise."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from .errors import UserError
from .networks.vision import import_vision

if TYPE_CHECKING:
    from PIL.Image import Image

#: Mean and standard deviation of ImageNet's pixels, by channel, from 0 to 1.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Transform = Callable[["Image"], Tensor]  # from a PIL image to a (3, size, size) tensor
AUGMENTATIONS = ("imagenet", "randaugment", "cifar", "none")


def training_transform(size: int, augmentation: str = "imagenet", crop: float = 0.875) -> Transform:
    """A random transform from a PIL image to a normalised (3, size, size) tensor.

    Args:
        size: in pixels.
        augmentation: imagenet (a random part of the image, resized, and flips), randaugment (the same and two
            operations of RandAugment, arXiv 1909.13719), cifar (a shift by up to an eighth, and flips), or none.
        crop: for augmentation none, as in `evaluation_transform`.

    Raises:
        UserError: there is no such augmentation, or torchvision is not installed.
    """
    t = import_vision("torchvision.transforms")
    if augmentation not in AUGMENTATIONS:
        raise UserError(f"--augmentation is {augmentation!r}; give one of {', '.join(AUGMENTATIONS)}")
    if augmentation == "none":
        return evaluation_transform(size, crop)
    if augmentation == "cifar":
        steps = [t.Resize((size, size)), t.RandomCrop(size, padding=size // 8), t.RandomHorizontalFlip()]
    else:
        steps = [t.RandomResizedCrop(size, interpolation=t.InterpolationMode.BICUBIC), t.RandomHorizontalFlip()]
    if augmentation == "randaugment":
        steps.append(t.RandAugment(num_ops=2, magnitude=9))
    return t.Compose([*steps, t.ToTensor(), t.Normalize(MEAN, STD)])


def evaluation_transform(size: int, crop: float = 0.875) -> Transform:
    """A transform from a PIL image to the normalised (3, size, size) tensor of its centre.

    Args:
        size: in pixels.
        crop: the side of the centre as a share of the image's shorter side.

    Raises:
        UserError: torchvision is not installed.
    """
    t = import_vision("torchvision.transforms")
    resize = t.Resize(round(size / crop), interpolation=t.InterpolationMode.BICUBIC)
    return t.Compose([resize, t.CenterCrop(size), t.ToTensor(), t.Normalize(MEAN, STD)])
