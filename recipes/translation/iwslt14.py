"""IWSLT'14 German-English as plain lines, in the usual splits: from its folder OUT/{train,valid,test}.{de,en}.

    python -m recipes.translation.iwslt14 de-en OUT

Every 23rd pair of the training text is for validation, and the test set is the five small sets together, as in
fairseq's example. Letters keep their case. Pairs with an empty side go, and so do those of the training text with a
side of more than 175 words, or more than 1.5 times as long as the other.
"""

import html
import re
import sys
from collections.abc import Iterator
from pathlib import Path

LANGS = ("de", "en")
TESTS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
EVERY = 23  # of the training pairs one is for validation
WORDS, RATIO = 175, 1.5
_HEADER = re.compile(r"<(/?doc|url|talkid|keywords|speaker|reviewer|translator)\b")
_TAG = re.compile(r"</?(title|description)>")
_SEGMENT = re.compile(r"<seg id=\"\d+\">(.*)</seg>")

Pair = tuple[str, ...]


class BadFolderError(Exception):
    """A folder that is not IWSLT'14's, in one line."""


def training_lines(path: Path) -> list[str]:
    """The sentences of a file train.tags.de-en.LANG, in their order; its talks' headers are left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [" ".join(_TAG.sub(" ", line).split()) for line in lines if not _HEADER.search(line)]


def segments(path: Path) -> list[str]:
    """The sentences of a small set, an XML file."""
    found = (_SEGMENT.search(line) for line in path.read_text(encoding="utf-8").split("\n"))
    return [" ".join(html.unescape(match[1]).split()) for match in found if match]


def paired(name: str, sides: list[list[str]]) -> Iterator[Pair]:
    """The pairs of two sides without an empty one. Raises BadFolderError where the sides differ in length."""
    if len(sides[0]) != len(sides[1]):
        raise BadFolderError(
            f"{name}: {len(sides[0])} lines in {LANGS[0]} and {len(sides[1])} in {LANGS[1]}; unpack it again"
        )
    yield from (pair for pair in zip(*sides, strict=True) if all(pair))


def is_clean(pair: Pair) -> bool:
    """Whether no side is too long, or too long for the other."""
    short, long = sorted(len(side.split()) for side in pair)
    return long <= WORDS and long <= RATIO * short


def splits(folder: Path) -> dict[str, list[Pair]]:
    """The pairs of train, valid and test.

    Raises:
        BadFolderError: a file is missing, or its two sides differ in length.
    """
    names = {"train": [f"train.tags.de-en.{lang}" for lang in LANGS]}
    names |= {test: [f"IWSLT14.{test}.de-en.{lang}.xml" for lang in LANGS] for test in TESTS}
    for name in (name for pair in names.values() for name in pair):
        if not (folder / name).is_file():
            raise BadFolderError(f"{folder / name} does not exist; give the folder de-en of IWSLT'14")
    training = list(filter(is_clean, paired("train", [training_lines(folder / name) for name in names["train"]])))
    return {
        "train": [pair for number, pair in enumerate(training, 1) if number % EVERY],
        "valid": training[EVERY - 1 :: EVERY],
        "test": [pair for test in TESTS for pair in paired(test, [segments(folder / name) for name in names[test]])],
    }


def main() -> None:
    """Write the six files."""
    if len(sys.argv) != 3:
        sys.exit(
            "error: give the folder of IWSLT'14 and an output folder: python -m recipes.translation.iwslt14 de-en OUT"
        )
    out = Path(sys.argv[2])
    try:
        found = splits(Path(sys.argv[1]))
    except (BadFolderError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    out.mkdir(parents=True, exist_ok=True)
    for split, pairs in found.items():
        print(f"{split}: {len(pairs):,} pairs")
        for lang, lines in zip(LANGS, zip(*pairs, strict=True), strict=True):
            (out / f"{split}.{lang}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
