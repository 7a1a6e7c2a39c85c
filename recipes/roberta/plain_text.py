"""WikiText's tokens as plain text, so that what a model reads in pre-training looks like what it reads afterwards.

    python -m recipes.roberta.plain_text IN OUT

WikiText puts spaces around punctuation, and writes a hyphen or a comma inside a word or a number as " @-@ " or " @,@ ".
Empty lines and headings (" = Title = ") are left out; an article's end is an empty line, as RoBERTa's task wants it.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

_QUOTED = re.compile(r'" ([^"]*?) "')  # a pair of quotes on one line
_BEFORE = re.compile(r" ([.,;:!?)\]%]|'(?:s|re|ve|ll|d|m|t)\b)")  # no space before these
_AFTER = re.compile(r"([(\[$£]) ")  # nor after these
_TITLE = re.compile(r"= [^=].*[^=] =|= . =")


def plain(line: str) -> str:
    """A line of WikiText without its tokenization."""
    text = re.sub(r" @(.)@ ", r"\1", line.strip())
    text = re.sub(r"(\w) n't\b", r"\1n't", text)
    return _AFTER.sub(r"\1", _BEFORE.sub(r"\1", _QUOTED.sub(r'"\1"', text)))


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """The paragraphs of WikiText as plain text, with an empty line between articles."""
    written = False
    for line in map(str.strip, lines):
        if _TITLE.fullmatch(line):
            if written:
                yield ""
            written = False
        elif line and not line.startswith("= "):
            yield plain(line)
            written = True


def main() -> None:
    """Rewrite one file."""
    if len(sys.argv) != 3:
        sys.exit("error: give two files: python -m recipes.roberta.plain_text IN OUT")
    source, target = map(Path, sys.argv[1:])
    with source.open(encoding="utf-8") as lines, target.open("w", encoding="utf-8") as out:
        out.writelines(f"{line}\n" for line in paragraphs(lines))


if __name__ == "__main__":
    main()
