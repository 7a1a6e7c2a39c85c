"""The score of a network on a task's validation sentences, and its milliseconds a sentence, in PyTorch without fairseq.

    python -m recipes.posthoc.score FILE TEXT NETWORK --task TASK [--sentences 50]

FILE is a packed file or a checkpoint, TEXT the folder that recipes.posthoc.texts wrote, NETWORK the folder of dict.txt.
The score is the accuracy of mnli and sst2, Spearman's rank correlation of stsb, and the share of masked residues that
are found, each in percent. Milliseconds are the median over single sentences, on the threads that torch has.
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
def milliseconds(network: nn.Module, rows: Iterable[list[int]]) -> float:
    """The median time of a forward pass of a single row."""
    heads: Any = network.classification_heads
    head = next(iter(heads), None)
    times = []
    for row in rows:
        tokens = torch.tensor([row])
        began = time.perf_counter()
        network(tokens, head)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def main() -> None:
    """Print the figures of one file as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("network", type=Path)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--labels", type=Path, help="the dict.txt of the labels, for mnli and sst2")
    parser.add_argument(
        "--separator", action="store_true", help="a second </s> between two sentences, as RoBERTa has it"
    )
    parser.add_argument("--sentences", type=int, default=50, help="for the time of one (default 50)")
    args = parser.parse_args()
    network = network_of(args.file)
    rows = sentences(args.text, args.network / "dict.txt", TASKS[args.task], args.separator)
    found = score(network, args.task, args.text, args.network, args.labels, args.separator)
    time_of_one = milliseconds(network, rows[: args.sentences])
    line = {"score": round(found, 2), "ms": round(time_of_one, 2), "bytes": os.path.getsize(args.file)}
    print(json.dumps(line | {"threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
