"""The sentences of a task as a network's symbols: a line of symbols for each sentence, and a line for each label.

    python -m recipes.posthoc.texts TASK DATA NETWORK OUT [--most N] [--train N]

TASK is mnli, sst2, stsb or residues; NETWORK the folder of dict.txt and of the tokenizer's files, as from-hf writes
them. DATA is a folder with glue_data/MNLI, sst2 or stsb in it and, for residues, a .csv with a column input_seq, or
text.
OUT gets {train,valid}.{input0,input1,label} and, for classes, labels.txt, their dictionary.
"""

import argparse
import csv
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from fairseq_quant_noise.checkpoints.hugging_face.word_pieces import UNKNOWN, WordPieces
from recipes.mnli.pairs import LABELS, BadTableError, pairs

TASKS = {"mnli": 2, "sst2": 1, "stsb": 2, "residues": 1}  # how many sentences a row has
_CLASSES = {"mnli": LABELS, "sst2": ("0", "1")}
_SPLITS = {"train": "train", "valid": "dev"}
_HELD_OUT = 0.1  # share of the chains of residues, or 2,000, that the validation has
Row = tuple[str, ...]  # sentences, and the label last where there is one


def rows(task: str, data: Path) -> dict[str, list[Row]]:
    """The rows of a task by split.

    Raises:
        BadTableError: a file is missing, or is not of this task.
    """
    try:
        if task == "mnli":
            folder = next(
                (p for p in (data / "glue_data/MNLI", data / "MNLI", data) if (p / "train.tsv").is_file()), data
            )
            return {split: list(pairs(folder / f"{name}.tsv")) for split, name in _MNLI.items()}
        if task == "sst2":
            return {split: _sst2(data / f"sst2/{name}.tsv") for split, name in _SPLITS.items()}
        if task == "stsb":
            return {split: _stsb(data / f"stsb/{name}.csv") for split, name in _SPLITS.items()}
        return _residues(data)
    except OSError as error:
        raise BadTableError(f"{error.filename}: {error.strerror}; give the folder of the data of {task}") from None


_MNLI = {"train": "train", "valid": "dev_matched"}


def _sst2(path: Path) -> list[Row]:
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    found = [tuple(part.strip() for part in line.split("\t")) for line in lines if line.strip()]
    if not found or not all(len(row) == 2 and row[1] in "01" for row in found):
        raise BadTableError(f"{path}: is no table of sentence and label; give SST-2")
    return found


def _stsb(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        found = [tuple(row) for row in csv.reader(file) if row]
    try:
        if not found or not all(0 <= float(score) <= 5 for _, _, score in found):
            raise ValueError
    except ValueError:
        raise BadTableError(f"{path}: is no table of two sentences and a score up to 5; give STS-B") from None
    return [(one, two, f"{float(score) / 5:.4f}") for one, two, score in found]


def _residues(path: Path) -> dict[str, list[Row]]:
    """Chains of residues, each letter a symbol; the last tenth, at most 2,000, is for validation."""
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            chains = [row["input_seq"] for row in csv.DictReader(file) if row.get("input_seq")]
        else:
            chains = file.read().split()
    if len(chains) < 2 or not all(chain.isalpha() for chain in chains):
        raise BadTableError(
            f"{path}: holds no chains of residues; give a .csv with a column input_seq, or lines of letters"
        )
    held = max(1, min(2000, int(_HELD_OUT * len(chains))))
    return {"train": [(chain,) for chain in chains[:-held]], "valid": [(chain,) for chain in chains[-held:]]}


def encoder(task: str, network: Path) -> Callable[[str], list[str]]:
    """What turns text into the network's symbols, by the files that are beside its dictionary.

    Raises:
        BadTableError: none of them is there.
    """
    if task == "residues":
        return list
    if (network / "vocab.txt").is_file():
        pieces = WordPieces.of(network / "vocab.txt")
        return lambda text: ["<unk>" if piece == UNKNOWN else piece for piece in pieces.encode(text)]
    if (network / "encoder.json").is_file():
        from fairseq.data.encoders.gpt2_bpe_utils import get_encoder

        pairs_of = get_encoder(str(network / "encoder.json"), str(network / "vocab.bpe"))
        return lambda text: [str(number) for number in pairs_of.encode(text)]
    if (network / "sentencepiece.bpe.model").is_file():
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(str(network / "sentencepiece.bpe.model"))
        return lambda text: model.Encode(text, out_type=str)
    raise BadTableError(f"{network}: has no vocab.txt, encoder.json or sentencepiece.bpe.model; run from-hf first")


def write(
    out: Path, split: str, columns: int, found: Iterable[Row], encode: Callable[[str], list[str]], most: int
) -> int:
    """Write the lines of a split; how many.

    Args:
        out: the folder.
        split: train or valid.
        columns: sentences of a row.
        found: the rows.
        encode: text to symbols.
        most: symbols of a sentence; the rest is cut off.
    """
    parts = [f"input{i}" for i in range(columns)] + ["label"]
    lines: dict[str, list[str]] = {part: [] for part in parts}
    for row in found:
        for part, text in zip(parts, row, strict=False):
            lines[part].append(text if part == "label" else " ".join(encode(text)[:most]))
    for part, texts in lines.items():
        if texts:
            (out / f"{split}.{part}").write_text("".join(f"{line}\n" for line in texts), encoding="utf-8")
    return len(lines["input0"])


def main() -> None:
    """Write the files of one task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("data", type=Path)
    parser.add_argument("network", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--most", type=int, default=64, help="symbols of a sentence (default 64; 142 for residues)")
    parser.add_argument("--train", type=int, help="take the first N rows for training")
    args = parser.parse_args()
    try:
        found, encode = rows(args.task, args.data), encoder(args.task, args.network)
    except (BadTableError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    args.out.mkdir(parents=True, exist_ok=True)
    most = 142 if args.task == "residues" else args.most
    if args.task in _CLASSES:
        (args.out / "labels.txt").write_text("".join(f"{label} 1\n" for label in _CLASSES[args.task]))
    for split, part in found.items():
        taken = part[: args.train] if split == "train" else part
        print(f"{args.task} {split}: {write(args.out, split, TASKS[args.task], taken, encode, most):,} rows")


if __name__ == "__main__":
    main()
