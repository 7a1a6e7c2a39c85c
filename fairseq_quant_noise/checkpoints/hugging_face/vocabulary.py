"""Read the tokens of a Hugging Face folder, and put them in the order and the files of a fairseq dictionary.

A fairseq dictionary begins with <s>, <pad>, </s> and <unk> and, in a RoBERTa, ends with <mask>; dict.txt has the
symbols in between. A BERT's five special tokens are elsewhere, so that its rows change places.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import DamagedFileError, UserError
from .byte_pairs import numbers_of
from .folder import as_json, read_json
from .sentence_pieces import read_pieces

#: Keys of tokenizer_config.json for the tokens that stand at fairseq's 0, 1, 2, 3 and end, and their usual names.
_SPECIAL = ("cls_token", "pad_token", "sep_token", "unk_token", "mask_token")
_NAMES = {
    "bert": ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"),
    "roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
}
FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"
BYTE_PAIRS, WORD_PIECES, SENTENCE_PIECES = "BPE", "WordPiece", "Unigram"  # types in tokenizer.json
_COPIED = ("tokenizer.json", "sentencepiece.bpe.model", "tokenizer_config.json")


@dataclass(frozen=True)
class Vocabulary:
    """The words of a network in fairseq's order."""

    order: list[int]  # the row of Hugging Face's embedding for each row of fairseq's
    files: dict[str, bytes]  # by name: dict.txt, and what turns text into its symbols
    notes: list[str] = field(default_factory=list)  # what the user should know


@dataclass
class _Tokens:
    scheme: str | None  # a type of tokenizer.json; None without a tokenizer
    ids: dict[str, int]  # the number of each token
    merges: list[tuple[str, str]] = field(default_factory=list)  # of byte pairs, in the order in which they apply
    options: dict[str, Any] = field(default_factory=dict)  # of word pieces: how text is prepared


def read_vocabulary(folder: Path, kind: str, rows: int) -> Vocabulary:
    """The vocabulary of a folder whose embedding has `rows` words.

    Args:
        folder: with tokenizer.json, or vocab.txt, vocab.json and merges.txt, or sentencepiece.bpe.model. A RoBERTa may
            have none; its words are then their numbers.
        kind: model_type in config.json.
        rows: of the embedding.

    Raises:
        UserError: no tokenizer of a BERT, no special token, or a token beyond the embedding.
        DamagedFileError: a file is damaged.
    """
    tokens = _read_tokens(folder)
    if tokens.scheme is None:
        if kind == "bert":
            raise UserError(
                f"{folder}: has no tokenizer.json or vocab.txt, which say where [CLS] and [PAD] are; add one"
            )
        order = [*range(rows)]
        text = "".join(f"{row} 1\n" for row in order[len(FAIRSEQ) : -1])
        return Vocabulary(order, {"dict.txt": text.encode()}, ["no tokenizer: the words in dict.txt are numbers"])
    special = _special(folder, kind, tokens.ids)
    beyond = [token for token, i in tokens.ids.items() if not 0 <= i < rows]
    if beyond:
        raise UserError(
            f"{folder}: token {beyond[0]!r} is number {tokens.ids[beyond[0]]}, and the embedding has {rows} rows"
        )
    order = [*special[:-1], *(i for i in range(rows) if i not in special), special[-1]]
    by_row: dict[int, str] = {i: token for token, i in tokens.ids.items()}
    words = [by_row.get(i) for i in order]
    return Vocabulary(order, _files(folder, tokens, words, order))


def _read_tokens(folder: Path) -> _Tokens:
    """The tokens by number, from the first kind of file that is there."""
    whole = folder / "tokenizer.json"
    if whole.is_file():
        return _of_tokenizer_json(whole)
    if (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        ids = {token.rstrip("\r"): i for i, token in enumerate(lines) if token.strip()}
        return _Tokens(WORD_PIECES, ids, options=_preparation(folder))
    if (folder / "vocab.json").is_file():
        ids = read_json(folder / "vocab.json")
        if not (folder / "merges.txt").is_file():
            raise UserError(f"{folder}: has vocab.json without merges.txt; download it too")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").removeprefix("#version: 0.2").split("\n")
        return _Tokens(BYTE_PAIRS, _checked(folder / "vocab.json", ids), _merges(lines))
    if (folder / "sentencepiece.bpe.model").is_file():
        pieces = read_pieces(folder / "sentencepiece.bpe.model")[3:]  # without its own <unk>, <s>, </s>
        names = [*FAIRSEQ, *pieces, MASK]
        return _Tokens(SENTENCE_PIECES, {token: i for i, token in enumerate(names)})
    return _Tokens(None, {})


def _of_tokenizer_json(path: Path) -> _Tokens:
    content = read_json(path)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or model.get("type") not in (BYTE_PAIRS, WORD_PIECES, SENTENCE_PIECES):
        kind = model.get("type") if isinstance(model, dict) else None
        raise UserError(
            f"{path}: a tokenizer of type {kind!r} cannot be converted; only BPE, WordPiece and Unigram can"
        )
    vocab = model.get("vocab")
    if isinstance(vocab, list) and all(isinstance(pair, list) and pair for pair in vocab):
        vocab = {pair[0]: i for i, pair in enumerate(vocab)}
    ids = _checked(path, vocab)
    for added in content.get("added_tokens") or []:
        ids |= _checked(path, {added.get("content"): added.get("id")} if isinstance(added, dict) else None)
    if model["type"] == BYTE_PAIRS:
        return _Tokens(BYTE_PAIRS, ids, _merges(model.get("merges") or []))
    return _Tokens(model["type"], ids, options=_preparation(path.parent, content.get("normalizer")))


def _checked(path: Path, ids: Any) -> dict[str, int]:
    if not isinstance(ids, dict) or not all(isinstance(t, str) and type(i) is int for t, i in ids.items()):
        raise DamagedFileError(f"{path}: has no numbers by token; download it again")
    return dict(ids)


def _merges(given: Iterable[Any]) -> list[tuple[str, str]]:
    """Pairs, which are texts with a space between in older files."""
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in given]
    return [pair for pair in pairs if len(pair) == 2]


def _preparation(folder: Path, normalizer: Any = None) -> dict[str, Any]:
    """How word pieces are made of text: options of BertTokenizer, from the normalizer in tokenizer.json where it is."""
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    names = {
        "do_lower_case": "lowercase",
        "strip_accents": "strip_accents",
        "tokenize_chinese_chars": "handle_chinese_chars",
    }
    usual = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
    options = {name: config.get(name, default) for name, default in usual.items()}
    if isinstance(normalizer, dict):
        options |= {ours: normalizer[theirs] for ours, theirs in names.items() if theirs in normalizer}
    return options


def _special(folder: Path, kind: str, ids: dict[str, int]) -> list[int]:
    """Numbers of the tokens that become <s>, <pad>, </s>, <unk> and <mask>."""
    given: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            given |= read_json(folder / name)
    found = []
    for key, usual in zip(_SPECIAL, _NAMES["bert" if kind == "bert" else "roberta"], strict=True):
        token = given.get(key) or usual
        token = token.get("content", usual) if isinstance(token, dict) else token
        if token not in ids:
            raise UserError(f"{folder}: its tokenizer has no {key} {token!r}, which a fairseq RoBERTa needs; add it")
        found.append(ids[token])
    if len({*found}) < len(found):
        raise UserError(f"{folder}: two of the special tokens {', '.join(_SPECIAL)} are one; give each its own")
    return found


def _files(folder: Path, tokens: _Tokens, words: list[str | None], order: list[int]) -> dict[str, bytes]:
    """dict.txt, and the files of the tokenizer for this order of words."""
    first, last = len(FAIRSEQ), len(words) - 1
    if tokens.scheme == BYTE_PAIRS:
        numbers = numbers_of(tokens.merges)
        symbols = [None if word is None else str(numbers.get(word, word)) for word in words[first:last]]
        pairs = "".join(f"{one} {two}\n" for one, two in tokens.merges)
        files = {"encoder.json": as_json(numbers), "vocab.bpe": f"#version: 0.2\n{pairs}".encode()}
    elif tokens.scheme == WORD_PIECES:
        symbols = words[first:last]
        listed = [word or filler(i) for i, word in enumerate(words)]
        config = {"tokenizer_class": "BertTokenizer", **tokens.options}
        config |= {key: words[i] for key, i in zip(_SPECIAL, (0, 1, 2, 3, last), strict=True)}
        files = {
            "vocab.txt": "".join(f"{word}\n" for word in listed).encode(),
            "tokenizer_config.json": as_json(config),
        }
    else:
        symbols = words[first:last]
        moved = order != [*range(len(order))]
        files = {name: (folder / name).read_bytes() for name in _COPIED if not moved and (folder / name).is_file()}
    return {"dict.txt": _dictionary(symbols).encode(), **files}


def filler(row: int) -> str:
    """The word of a row that no text has, by fairseq's custom."""
    return f"madeupword{row:04d}"


def _dictionary(symbols: list[str | None]) -> str:
    """The lines of dict.txt: a symbol and a count. What cannot stand in a line, or stands there already, is filled."""
    seen = {*FAIRSEQ, MASK}
    lines = []
    for row, symbol in enumerate(symbols, len(FAIRSEQ)):
        fits = symbol and symbol not in seen and not any(map(str.isspace, symbol))
        seen.add(word := str(symbol) if fits else filler(row))
        lines.append(f"{word} 1\n")
    return "".join(lines)
