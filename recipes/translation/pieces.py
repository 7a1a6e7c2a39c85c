"""Parallel text in sentencepiece's pieces, one tokenizer and one dictionary for both languages.

    python -m recipes.translation.pieces OUT --langs de en --words 10000 train=PREFIX valid=PREFIX [test=PREFIX]

reads PREFIX.de and PREFIX.en of each split, and writes OUT/SPLIT.{de,en}, OUT/spm.model and OUT/dict.txt. Pairs of the
training text with an empty side are left out. The tokenizer is trained on the training text alone.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from recipes.quickstart.corpus import train_tokenizer, write_dictionary


class BadTextError(Exception):
    """Text that is not parallel, in one line."""


def read_pairs(prefix: str, langs: list[str]) -> list[tuple[str, ...]]:
    """The pairs of PREFIX.LANG for two languages, empty ones included.

    Raises:
        BadTextError: the two files have other numbers of lines.
        OSError, UnicodeDecodeError: a file that cannot be read, or is not UTF-8.
    """
    sides = [Path(f"{prefix}.{lang}").read_text(encoding="utf-8").removesuffix("\n").split("\n") for lang in langs]
    if len(sides[0]) != len(sides[1]):
        raise BadTextError(
            f"{prefix}.{langs[0]} has {len(sides[0])} lines and {prefix}.{langs[1]} {len(sides[1])}; "
            "give two files whose lines belong together"
        )
    return [tuple(line.strip() for line in pair) for pair in zip(*sides, strict=True)]


def write_pieces(out: Path, langs: list[str], words: int, prefixes: dict[str, str]) -> None:
    """See the module; prints a row a split."""
    text = {split: read_pairs(prefix, langs) for split, prefix in prefixes.items()}
    text["train"] = [pair for pair in text["train"] if all(pair)]
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer((line for pair in text["train"] for line in pair), out / "spm.model", words)
    counts: Counter[str] = Counter()
    for split, pairs in text.items():
        row = f"{split}: {len(pairs):,} pairs"
        for lang, lines in zip(langs, zip(*pairs, strict=True), strict=True):
            encoded: list[list[str]] = tokenizer.encode(list(lines), out_type=str)
            (out / f"{split}.{lang}").write_text("".join(" ".join(p) + "\n" for p in encoded), encoding="utf-8")
            row += f", {sum(map(len, encoded)):,} pieces in {lang}"
            if split == "train":
                counts.update(piece for pieces in encoded for piece in pieces)
        print(row)
    write_dictionary(tokenizer, counts, out / "dict.txt")


def main() -> None:
    """Exit code 0, or 2 when the text is not parallel or too small for the dictionary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--langs", nargs=2, required=True)
    parser.add_argument("--words", type=int, required=True)
    parser.add_argument("splits", nargs="+")
    args = parser.parse_args()
    try:
        write_pieces(args.out, args.langs, args.words, dict(split.split("=", 1) for split in args.splits))
    except (BadTextError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as fault:  # sentencepiece names the largest (or smallest) size that fits
        print(f"error: --words {args.words}: {fault}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
