"""Text as the byte pairs of GPT-2, which RoBERTa's dictionary is made of: a line of numbers for each line of text.

    python -m recipes.gpt2_bpe --bpe DIR IN OUT [--workers N]

DIR holds encoder.json and vocab.bpe; IN and OUT are files. OUT appears whole or not at all.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from fairseq.data.encoders.gpt2_bpe_utils import Encoder, get_encoder

ENCODER_FILES = ("encoder.json", "vocab.bpe")
_CHUNK = 1000  # lines that a process takes at a time

_encoder: Encoder  # one a process


def _start(folder: str) -> None:
    global _encoder
    _encoder = get_encoder(*(f"{folder}/{name}" for name in ENCODER_FILES))


def _encode(line: str) -> str:
    return " ".join(map(str, _encoder.encode(line.rstrip("\r\n"))))


def _encoded(folder: str, lines: Iterator[str], workers: int) -> Iterable[str]:
    """The lines in byte pairs; what one process takes at a time is done here, for a second one must import fairseq."""
    head = list(islice(lines, _CHUNK + 1))
    if workers == 1 or len(head) <= _CHUNK:
        _start(folder)
        yield from map(_encode, chain(head, lines))
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([Encoder.__module__])  # fairseq is imported once, not in each
    with context.Pool(workers, _start, (folder,)) as pool:
        yield from pool.imap(_encode, chain(head, lines), _CHUNK)


def encode_file(bpe: Path, source: Path, target: Path, workers: int) -> int:
    """Write `target`, the lines of `source` in byte pairs; empty lines stay empty.

    Returns:
        the number of lines.
    """
    part = target.with_name(f"{target.name}.part")
    count = 0
    with (
        source.open(encoding="utf-8", newline="\n") as lines,
        part.open("w", encoding="utf-8") as out,
    ):
        for encoded in _encoded(str(bpe), lines, workers):
            print(encoded, file=out)
            count += 1
    part.replace(target)
    return count


def main() -> None:
    """Encode one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("target", type=Path, metavar="OUT")
    parser.add_argument("--bpe", type=Path, required=True, metavar="DIR")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    for file in (args.source, *(args.bpe / name for name in ENCODER_FILES)):
        if not file.is_file():
            print(f"error: {file} does not exist", file=sys.stderr)
            sys.exit(2)
    print(f"{args.target}: {encode_file(args.bpe, args.source, args.target, args.workers):,} lines")


if __name__ == "__main__":
    main()
