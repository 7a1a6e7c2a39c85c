"""A text corpus that every machine has: the documentation strings of the Python standard library.

The sources are read with `ast`, nothing is imported. A docstring belongs to train, valid or test by the hash
of its text, and a paragraph that has stood before is dropped, so that no split holds text of another.
The corpus depends on the Python release and on nothing else: the files are sorted, the tokenizer runs on one
thread.

    python corpus.py /tmp/quickstart --vocab-size 6000
"""

import argparse
import ast
import hashlib
import io
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

SPLITS = ("train", "valid", "test")
SKIPPED = {"test", "tests", "idlelib", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FAIRSEQ_SPECIALS = 4  # <s> <pad> </s> <unk>: fairseq adds them itself
SPM_SPECIALS = 3  # <unk> <s> </s>: the tokenizer's own, which never reach the token files


def source_files(root: Path) -> list[Path]:
    """The .py files under `root` in sorted order, without test suites and installed packages."""
    return [path for path in sorted(root.rglob("*.py")) if not SKIPPED.intersection(path.relative_to(root).parts[:-1])]


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of one file: module, classes and functions, from the outside in."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # a template or a deliberately broken file
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text


def paragraphs(text: str) -> Iterator[str]:
    """Blocks between blank lines, each on one line with single spaces."""
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        if words := line.split():
            block += words
        elif block:
            yield " ".join(block)
            block = []


def split_of(text: str) -> str:
    """90 % train, 5 % valid, 5 % test, by the hash of the docstring."""
    percent = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 100
    return "train" if percent < 90 else "valid" if percent < 95 else "test"


def collect(root: Path) -> dict[str, list[str]]:
    """Split name -> lines (paragraphs), in the order of the files; each paragraph once."""
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for path in source_files(root):
        for text in docstrings(path):
            fresh = [line for line in paragraphs(text) if line not in seen]
            seen.update(fresh)
            lines[split_of(text)] += fresh
    return lines


def train_tokenizer(lines: Iterable[str], path: Path, vocab_size: int) -> SentencePieceProcessor:
    """Byte-pair pieces from the training lines, saved to `path`.

    `vocab_size` is the size of fairseq's dictionary, its four special symbols included.
    """
    model = io.BytesIO()  # not a file name, which would stand inside the model and change its bytes
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size - FAIRSEQ_SPECIALS + SPM_SPECIALS,
        character_coverage=0.9999,
        max_sentence_length=1 << 20,  # bytes: no paragraph is left out
        num_threads=1,
        minloglevel=1,
    )
    path.write_bytes(model.getvalue())
    return SentencePieceProcessor(model_proto=model.getvalue())


def write_dictionary(tokenizer: SentencePieceProcessor, counts: Counter[str], path: Path) -> None:
    """fairseq's dict.txt, most frequent piece first: adaptive softmax takes the order for the frequency."""
    ids = range(SPM_SPECIALS, tokenizer.get_piece_size())
    pieces = sorted((tokenizer.id_to_piece(i) for i in ids), key=lambda piece: -counts[piece])
    path.write_text("".join(f"{piece} {counts[piece]}\n" for piece in pieces), encoding="utf-8")


def write_corpus(lines: dict[str, list[str]], out: Path, vocab_size: int) -> None:
    """Writes SPLIT.txt, SPLIT.spm, spm.model and dict.txt into `out`; prints a row a split."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(lines["train"], out / "spm.model", vocab_size)
    print(f"{'split':<6}{'lines':>9}{'words':>9}{'tokens':>9}{'characters':>12}")
    for split in SPLITS:
        encoded: list[list[str]] = tokenizer.encode(lines[split], out_type=str)
        text, words = "\n".join(lines[split]) + "\n", sum(len(line.split()) for line in lines[split])
        tokens = sum(len(pieces) + 1 for pieces in encoded)  # + 1: the end of the line
        (out / f"{split}.txt").write_text(text, encoding="utf-8")
        (out / f"{split}.spm").write_text("".join(" ".join(p) + "\n" for p in encoded), encoding="utf-8")
        print(f"{split:<6}{len(lines[split]):>9,}{words:>9,}{tokens:>9,}{len(text):>12,}")
        if split == "train":
            counts = Counter(piece for pieces in encoded for piece in pieces)
            write_dictionary(tokenizer, counts, out / "dict.txt")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A text corpus from the standard library's docstrings.")
    parser.add_argument("out", type=Path, help="folder for the text, the tokens, the tokenizer and dict.txt")
    parser.add_argument("--vocab-size", type=int, default=6000, help="fairseq's dictionary, all included")
    stdlib = Path(sysconfig.get_path("stdlib"))
    parser.add_argument("--source", type=Path, default=stdlib, help="folder of .py files")
    return parser.parse_args()


def main() -> int:
    """Exit code 0, or 2 when the library's sources are missing or too small for the vocabulary."""
    args = arguments()
    lines = collect(args.source)
    if not all(lines.values()):
        print(f"error: too few docstrings in the .py files under {args.source}; pass --source", file=sys.stderr)
        return 2
    try:
        write_corpus(lines, args.out, args.vocab_size)
    except RuntimeError as fault:  # sentencepiece names the largest (or smallest) size that fits
        print(f"error: --vocab-size {args.vocab_size}: {fault}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
