"""CIFAR-10 as a tree of images.

    python -m recipes.imagenet.cifar10 SOURCE OUT [--train 1000] [--val 200]

SOURCE holds either a tree train/CLASS/IMAGE and val/CLASS/IMAGE, or the binary version of the official site
(cifar-10-batches-bin, with data_batch_1.bin to 5 and test_batch.bin). OUT gets the same tree with the first so many
images of each class; it appears whole or not at all. The official Python version is a pickle, which is not read.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
RECORD = 1 + 3 * SIDE * SIDE  # a byte for the class, then the red, green and blue planes
BATCHES = {"train": "data_batch_*.bin", "val": "test_batch.bin"}


def records(source: Path, split: str) -> Iterator[tuple[str, np.ndarray]]:
    """Class and (32, 32, 3) uint8 image of each record of the binary version."""
    for path in sorted(source.rglob(BATCHES[split])):
        content = np.fromfile(path, dtype=np.uint8)
        if content.size % RECORD:
            raise SystemExit(f"error: {path}: not CIFAR-10's binary version ({content.size} bytes); download it again")
        for record in content.reshape(-1, RECORD):
            yield CLASSES[record[0]], record[1:].reshape(3, SIDE, SIDE).transpose(1, 2, 0)


def write_records(source: Path, out: Path, split: str, limit: int) -> None:
    """The first images of each class as PNG files."""
    from PIL import Image

    count = dict.fromkeys(CLASSES, 0)
    for name, pixels in records(source, split):
        if count[name] < limit:
            path = out / split / name / f"{count[name]:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            count[name] += 1


def copy_tree(source: Path, out: Path, split: str, limit: int) -> None:
    """The first images of each class of a tree, by name."""
    for folder in sorted(path for path in (source / split).iterdir() if path.is_dir()):
        (out / split / folder.name).mkdir(parents=True)
        for image in sorted(folder.iterdir())[:limit]:
            shutil.copyfile(image, out / split / folder.name / image.name)


def make_tree(source: Path, out: Path, limits: dict[str, int]) -> None:
    """Write OUT. Exits with one line where SOURCE holds no CIFAR-10."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    trees = [path.parent for path in sorted(source.rglob("train")) if (path.parent / "val").is_dir()]
    for split, limit in limits.items():
        if trees:
            copy_tree(trees[0], part, split, limit)
        else:
            write_records(source, part, split, limit)
        found = len(list((part / split).rglob("*.*"))) if (part / split).is_dir() else 0
        if not found:
            shutil.rmtree(part, ignore_errors=True)
            sys.exit(f"error: {source}: neither a tree train/CLASS and val/CLASS nor CIFAR-10's .bin files; see --help")
        print(f"{split}: {found} images")
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=1000, help="training images a class (default 1000)")
    parser.add_argument("--val", type=int, default=200, help="validation images a class (default 200)")
    args = parser.parse_args()
    make_tree(args.source, args.out, {"train": args.train, "val": args.val})


if __name__ == "__main__":
    main()
