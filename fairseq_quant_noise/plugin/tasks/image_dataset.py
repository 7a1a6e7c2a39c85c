"""Read an ImageFolder tree as a fairseq data set."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import FairseqDataset

from ...errors import UserError
from ...networks.vision import import_vision

_TREE = "give a folder with train/CLASS/IMAGE and val/CLASS/IMAGE"
#: Folders that hold a split, for the names that fairseq's options have by default.
_FOLDERS = {"valid": ("valid", "val")}


def split_folder(data: str, split: str) -> Path:
    """The folder of a split.

    Raises:
        UserError: there is none.
    """
    for name in _FOLDERS.get(split, (split,)):
        if (Path(data) / name).is_dir():
            return Path(data) / name
    raise UserError(f"{data}: has no folder {split!r}; {_TREE}")


def class_names(folder: Path) -> list[str]:
    """The classes of a split, sorted.

    Raises:
        UserError: there are none.
    """
    found = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not found:
        raise UserError(f"{folder}: has no folders of classes; {_TREE}")
    return found


class ImageDataset(FairseqDataset):
    """Images with their classes.

    Args:
        folder: of the split: a folder a class.
        classes: in the order of the network's outputs; the folder may lack some of them.
        transform: from a PIL image to a (3, H, W) tensor.
        shuffle: mix the images anew each epoch.
        seed: of shuffling and augmentation: both are functions of seed, epoch and image alone, so that a resumed run
            sees what it would have seen.

    Raises:
        UserError: a class that the network does not know, or one without images.
    """

    def __init__(
        self, folder: Path, classes: Sequence[str], transform: Callable[[Any], Any], *, shuffle: bool, seed: int
    ) -> None:
        datasets = import_vision("torchvision.datasets")
        unknown = [name for name in class_names(folder) if name not in classes]
        if unknown:
            raise UserError(f"{folder}: the class {unknown[0]!r} is none of the network's {len(classes)}; {_TREE}")
        try:
            tree = datasets.ImageFolder(folder)
        except FileNotFoundError as error:
            raise UserError(f"{folder}: {str(error).splitlines()[0]}") from None
        number = {name: i for i, name in enumerate(classes)}
        self.images = [(path, number[tree.classes[found]]) for path, found in tree.samples]
        self.open, self.transform, self.shuffle, self.seed = tree.loader, transform, shuffle, seed
        self.epoch = 1
        self.sizes = np.ones(len(self.images), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, target = self.images[index]
        image = self.open(path)
        state = torch.default_generator.get_state()
        seed = np.random.SeedSequence((self.seed, self.epoch, int(index))).generate_state(1)[0]
        torch.default_generator.manual_seed(int(seed))
        try:
            return {"id": int(index), "image": self.transform(image), "target": target}
        finally:
            torch.default_generator.set_state(state)

    def collater(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of B samples: images (B, 3, H, W), target (B,)."""
        if not samples:
            return {}
        return {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "net_input": {"images": torch.stack([sample["image"] for sample in samples])},
            "target": torch.tensor([sample["target"] for sample in samples]),
            "ntokens": len(samples),
            "nsentences": len(samples),
        }

    def num_tokens(self, index: int) -> int:
        """An image counts as one."""
        return 1

    def num_tokens_vec(self, indices: Any) -> Any:
        """One for each image."""
        return np.ones(len(indices), dtype=np.int64)

    def size(self, index: int) -> int:
        """An image counts as one."""
        return 1

    def ordered_indices(self) -> Any:
        """All images, in the order of this epoch."""
        if not self.shuffle:
            return np.arange(len(self))
        return np.random.default_rng((self.seed, self.epoch)).permutation(len(self))

    def set_epoch(self, epoch: int) -> None:
        """fairseq says which epoch begins, from 1."""
        self.epoch = epoch

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        """Whether batches stay the same."""
        return not self.shuffle

    @property
    def supports_fetch_outside_dataloader(self) -> bool:
        """Whether fairseq may read a sample for its dummy batch: yes, from any place."""
        return True
