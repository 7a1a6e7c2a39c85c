"""Make the files of a Hugging Face tokenizer from a fairseq dictionary and the files that are beside it."""

from pathlib import Path

from ...errors import UserError
from .folder import as_json, read_json
from .vocabulary import FAIRSEQ, MASK

_PIECES = ("tokenizer.json", "sentencepiece.bpe.model")  # of an XLM-R, whose words fairseq has in the same order


def tokenizer_files(folder: Path, rows: int, positions: int, required: bool) -> tuple[dict[str, bytes], list[str]]:
    """The tokenizer's files by name, and what the user should know.

    Args:
        folder: of dict.txt and, as `from_folder` writes them, of encoder.json and vocab.bpe, of vocab.txt, or of
            tokenizer.json or sentencepiece.bpe.model.
        rows: words of the network.
        positions: the most tokens of a row.
        required: whether a folder without a fitting dict.txt is an error.

    Raises:
        UserError: the dictionary is missing, or of another network, and `required`.
    """
    problem = _problem(folder, rows)
    if problem:
        if required:
            raise UserError(f"{problem}; give the folder that from-hf wrote")
        return {}, [f"no tokenizer: {problem}; --dict FOLDER adds it"]
    if all((folder / name).is_file() for name in ("encoder.json", "vocab.bpe")):
        config = {"tokenizer_class": "RobertaTokenizer", "model_max_length": positions}
        return {**_byte_pairs(folder), "tokenizer_config.json": as_json(config)}, []
    names = ("vocab.txt",) if (folder / "vocab.txt").is_file() else _PIECES
    found = {
        name: (folder / name).read_bytes() for name in (*names, "tokenizer_config.json") if (folder / name).is_file()
    }
    if not any(name in found for name in names):
        return {}, [f"no tokenizer: {folder} has no encoder.json with vocab.bpe, vocab.txt, nor {' or '.join(_PIECES)}"]
    if "vocab.txt" in found:
        config = read_json(folder / "tokenizer_config.json") if "tokenizer_config.json" in found else {}
        found["tokenizer_config.json"] = as_json(
            {"tokenizer_class": "BertTokenizer", **config, "model_max_length": positions}
        )
    return found, []


def labels_in(folder: Path) -> list[str] | None:
    """The names of the classes in label/dict.txt, if it is there."""
    path = folder / "label" / "dict.txt"
    return _symbols(path) if path.is_file() else None


def _problem(folder: Path, rows: int) -> str | None:
    path = folder / "dict.txt"
    if not path.is_file():
        return f"{path} does not exist"
    words = len(_words(path))
    return None if words == rows else f"{path} has {words} words, and the network {rows}"


def _words(path: Path) -> list[str]:
    """All words of a dictionary, by fairseq's number."""
    symbols = _symbols(path)
    return [*FAIRSEQ, *symbols, *([] if MASK in symbols else [MASK])]


def _symbols(path: Path) -> list[str]:
    return [line.rpartition(" ")[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _byte_pairs(folder: Path) -> dict[str, bytes]:
    """vocab.json and merges.txt: each pair by its number in fairseq, by way of its number in encoder.json."""
    pairs = {str(number): pair for pair, number in read_json(folder / "encoder.json").items()}
    words = {pairs.get(word, word): row for row, word in enumerate(_words(folder / "dict.txt"))}
    return {"vocab.json": as_json(words), "merges.txt": (folder / "vocab.bpe").read_bytes()}
