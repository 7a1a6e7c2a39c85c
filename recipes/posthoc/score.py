"""The score of a network on a task's validation rows, and its milliseconds a row, in PyTorch without fairseq.

    python -m recipes.posthoc.score FILE DATA NETWORK --task TASK [--sentences 50]

FILE is a packed file or a checkpoint, DATA the folder that recipes.posthoc.texts wrote, or one with train/CLASS and
val/CLASS/IMAGE, NETWORK the folder of dict.txt, for images that of model.pt. The score is the accuracy of mnli, sst2
and images, Spearman's rank correlation of stsb, and the share of masked residues that are found, each in percent.
Milliseconds are the median over single sentences or images, on the threads that torch has.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_quant_noise import load
from fairseq_quant_noise.checkpoints.checkpoint import Checkpoint
from fairseq_quant_noise.images import evaluation_transform
from fairseq_quant_noise.networks.roberta import Roberta
from recipes.posthoc.flags import pixels
from recipes.posthoc.texts import TASKS

BEGIN, PADDING, END, UNKNOWN, _FIRST = 0, 1, 2, 3, 4
_ROWS, _EVERY = 64, 7  # sentences at a time; every seventh residue is masked


def network_of(path: Path) -> nn.Module:
    """The network of a packed file or a checkpoint, in eval mode."""
    return load(path) if path.suffix == ".safetensors" else Checkpoint(path).network


def sentences(text: Path, dictionary: Path, columns: int, separator: bool) -> list[list[int]]:
    """Rows of the network's numbers: <s> A </s> B </s>, as fairseq's task makes them.

    Args:
        text: the folder of valid.input0 and, with two columns, valid.input1.
        dictionary: dict.txt.
        columns: sentences of a row.
        separator: a second </s> before B, as RoBERTa has it.
    """
    words = [line.rpartition(" ")[0] for line in dictionary.read_text(encoding="utf-8").splitlines()]
    numbers = {word: i for i, word in enumerate(words, _FIRST)}
    parts = [(text / f"valid.input{i}").read_text(encoding="utf-8").splitlines() for i in range(columns)]
    between = [END] if separator else []
    rows = []
    for lines in zip(*parts, strict=True):
        encoded = [[numbers.get(word, UNKNOWN) for word in line.split()] + [END] for line in lines]
        rows.append([BEGIN, *encoded[0], *(number for part in encoded[1:] for number in between + part)])
    return rows


def batches(rows: list[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
    """Rows of like length together: their places, and the numbers (B, T), padded on the right."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for at in range(0, len(order), _ROWS):
        places = order[at : at + _ROWS]
        longest = max(len(rows[i]) for i in places)
        yield places, torch.tensor([rows[i] + [PADDING] * (longest - len(rows[i])) for i in places])


@torch.no_grad()
def predictions(network: nn.Module, rows: list[list[int]]) -> Tensor:
    """The scores of each class for each row, (rows, classes), by the network's only head."""
    (head,) = network.classification_heads  # type: ignore[union-attr]
    found: dict[int, Tensor] = {}
    for places, tokens in batches(rows):
        found |= dict(zip(places, network(tokens, head), strict=True))
    return torch.stack([found[i] for i in range(len(rows))])


@torch.no_grad()
def masked_accuracy(network: nn.Module, rows: list[list[int]], mask: int) -> float:
    """Share of masked words that are the best guess; row i has every seventh word masked, from word i mod 7 on."""
    right = total = 0
    for places, tokens in batches(rows):
        hidden = torch.zeros_like(tokens, dtype=torch.bool)
        for line, place in enumerate(places):
            hidden[line, 1 + place % _EVERY : len(rows[place]) - 1 : _EVERY] = True
        best = network(tokens.masked_fill(hidden, mask)).argmax(-1)
        right += int((best == tokens)[hidden].sum())
        total += int(hidden.sum())
    return right / total


def spearman(one: Tensor, two: Tensor) -> float:
    """Spearman's rank correlation of two vectors (N,); equal values share their mean rank."""
    ranks = torch.stack([_ranks(one), _ranks(two)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[inverse]


def labels(text: Path, dictionary: Path | None) -> Tensor:
    """The labels (N,) of the validation: numbers of classes by their dictionary; without one, the values."""
    lines = (text / "valid.label").read_text(encoding="utf-8").split()
    if dictionary is None:
        return torch.tensor([float(line) for line in lines])
    names = [line.rpartition(" ")[0] for line in dictionary.read_text(encoding="utf-8").splitlines()]
    return torch.tensor([names.index(line) for line in lines])


def images(data: Path, network: Path) -> tuple[list[Tensor], Tensor]:
    """The images of DATA/val, each (3, size, size), as the checkpoint `network` was trained on, and their classes (N,).

    A class is the place of its folder among those of DATA/train, as in fairseq's task.
    """
    from PIL import Image

    classes = {folder.name: i for i, folder in enumerate(sorted((data / "train").iterdir()))}
    paths = sorted(path for path in (data / "val").glob("*/*") if path.parent.name in classes)
    seen: Any = pixels(Checkpoint(network))
    transform = evaluation_transform(seen["image_size"], seen["crop_ratio"], seen["normalization"])
    found = []
    for path in paths:
        with Image.open(path) as image:
            found.append(transform(image.convert("RGB")))
    return found, torch.tensor([classes[path.parent.name] for path in paths])


@torch.no_grad()
def image_accuracy(network: nn.Module, pictures: list[Tensor], classes: Tensor) -> float:
    """The share of images (3, H, W) whose class (N,) is the best guess."""
    guesses = [network(torch.stack(pictures[at : at + _ROWS])).argmax(1) for at in range(0, len(pictures), _ROWS)]
    return float((torch.cat(guesses) == classes).float().mean())


def score(network: nn.Module, task: str, text: Path, folder: Path, label_names: Path | None, separator: bool) -> float:
    """The score of a network on a task, in percent."""
    rows = sentences(text, folder / "dict.txt", TASKS[task], separator)
    if task == "residues":
        mask = network.config.vocab_size - 1  # type: ignore[union-attr]
        return 100 * masked_accuracy(network, rows, int(mask))
    found = predictions(network, rows)
    if task == "stsb":
        return 100 * spearman(found[:, 0], labels(text, None))
    return 100 * float((found.argmax(1) == labels(text, label_names)).float().mean())


@torch.no_grad()
def milliseconds(network: nn.Module, rows: Iterable[Tensor]) -> float:
    """The median time of a forward pass of a single row: numbers (T,), or an image (3, H, W)."""
    heads = [next(iter(network.classification_heads), None)] if isinstance(network, Roberta) else []
    times = []
    for row in rows:
        began = time.perf_counter()
        network(row[None], *heads)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def main() -> None:
    """Print the figures of one file as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("network", type=Path)
    parser.add_argument("--task", choices=(*TASKS, "images"), required=True)
    parser.add_argument("--labels", type=Path, help="the dict.txt of the labels, for mnli and sst2")
    parser.add_argument(
        "--separator", action="store_true", help="a second </s> between two sentences, as RoBERTa has it"
    )
    parser.add_argument("--sentences", type=int, default=50, help="for the time of one (default 50)")
    args = parser.parse_args()
    network = network_of(args.file)
    if args.task == "images":
        rows, classes = images(args.data, args.network / "model.pt")
        found = 100 * image_accuracy(network, rows, classes)
    else:
        found = score(network, args.task, args.data, args.network, args.labels, args.separator)
        numbers = sentences(args.data, args.network / "dict.txt", TASKS[args.task], args.separator)
        rows = [torch.tensor(row) for row in numbers]
    time_of_one = milliseconds(network, rows[: args.sentences])
    line = {"score": round(found, 2), "ms": round(time_of_one, 2), "bytes": os.path.getsize(args.file)}
    print(json.dumps(line | {"threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
