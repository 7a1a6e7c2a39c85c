"""Cut text into the word pieces of a BERT (Devlin et al., arXiv 1810.04805), as its tokenizer does.

Text is cleaned, put in lower case without accents if the network wants that, and split at spaces and punctuation. Each
word is then cut from its beginning into the longest pieces that there are; a piece inside a word begins with ##.
"""

import unicodedata
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ...errors import UserError, is_about_a_file
from .folder import read_json

UNKNOWN, _INSIDE, _LONGEST = "[UNK]", "##", 100  # a longer word is unknown, as in BERT's tokenizer
#: First and last of the letters that are words by themselves: Chinese, Japanese and Korean ideographs.
_IDEOGRAPHS = (
    *((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F)),
    *((0x2B740, 0x2B81F), (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)),
)


class WordPieces:
    """Turns text into word pieces, and back.

    Args:
        pieces: the words of the network; those inside a word begin with ##.
        do_lower_case: whether the network knows lower case alone.
        strip_accents: whether it knows no accents; None: as `do_lower_case`.
        tokenize_chinese_chars: whether each ideograph is a word.
    """

    def __init__(
        self,
        pieces: Collection[str],
        do_lower_case: bool = True,
        strip_accents: bool | None = None,
        tokenize_chinese_chars: bool = True,
    ) -> None:
        self.pieces = {*pieces}
        self.do_lower_case, self.tokenize_chinese_chars = do_lower_case, tokenize_chinese_chars
        self.strip_accents = do_lower_case if strip_accents is None else strip_accents

    @classmethod
    def of(cls, vocab: str | Path) -> "WordPieces":
        """Those of a vocab.txt, with the options in tokenizer_config.json beside it.

        Raises:
            UserError: the file cannot be read.
            DamagedFileError: tokenizer_config.json is damaged.
        """
        path = Path(vocab)
        try:
            pieces = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            if not is_about_a_file(error):
                raise
            raise UserError(f"{path}: {error.strerror}; give the vocab.txt that from-hf wrote") from None
        beside = path.with_name("tokenizer_config.json")
        given: dict[str, Any] = read_json(beside) if beside.is_file() else {}
        names = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
        return cls(pieces, **{name: given[name] for name in names if name in given})

    def encode(self, text: str) -> list[str]:
        """The pieces of a text; a word that cannot be cut into pieces is [UNK]."""
        return [piece for word in self._words(text) for piece in self._cut(word)]

    def decode(self, pieces: Collection[str]) -> str:
        """The text of pieces, with a space before each that begins a word."""
        return " ".join(pieces).replace(f" {_INSIDE}", "")

    def _words(self, text: str) -> Iterator[str]:
        letters = (" " if letter.isspace() else letter for letter in text if not _is_control(letter))
        if self.tokenize_chinese_chars:
            letters = (f" {letter} " if _is_ideograph(letter) else letter for letter in letters)
        clean = "".join(letters)
        if self.strip_accents:
            clean = "".join(x for x in unicodedata.normalize("NFD", clean) if unicodedata.category(x) != "Mn")
        if self.do_lower_case:
            clean = clean.lower()
        return iter("".join(f" {x} " if _is_punctuation(x) else x for x in clean).split())

    def _cut(self, word: str) -> list[str]:
        if len(word) > _LONGEST:
            return [UNKNOWN]
        found: list[str] = []
        start = 0
        while start < len(word):
            prefix = _INSIDE if start else ""
            end = next((e for e in range(len(word), start, -1) if prefix + word[start:e] in self.pieces), None)
            if end is None:
                return [UNKNOWN]
            found.append(prefix + word[start:end])
            start = end
        return found


def _is_control(letter: str) -> bool:
    """Whether the tokenizer leaves it out: control and format characters, and their replacement."""
    return letter == "\ufffd" or (letter not in "\t\n\r" and unicodedata.category(letter) in ("Cc", "Cf", "Co"))


def _is_ideograph(letter: str) -> bool:
    return any(first <= ord(letter) <= last for first, last in _IDEOGRAPHS)


def _is_punctuation(letter: str) -> bool:
    """Every ASCII sign that is no letter or digit counts, such as $ and ^."""
    ascii_sign = "!" <= letter <= "~" and not letter.isalnum()
    return ascii_sign or unicodedata.category(letter).startswith("P")
