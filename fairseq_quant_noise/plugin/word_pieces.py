"""Provide `--bpe word_pieces`: a BERT's word pieces for fairseq, whose own `--bpe bert` needs another library."""

from dataclasses import dataclass, field
from typing import Any

from fairseq.data.encoders import register_bpe
from fairseq.dataclass import FairseqDataclass

from ..checkpoints.hugging_face.word_pieces import UNKNOWN, WordPieces

_UNKNOWN = "<unk>"  # fairseq's


@dataclass
class WordPiecesConfig(FairseqDataclass):
    """Where the pieces are."""

    word_pieces_vocab: str = field(
        default="vocab.txt",
        metadata={"help": "vocab.txt, with tokenizer_config.json beside it, as from-hf writes them"},
    )


@register_bpe("word_pieces", dataclass=WordPiecesConfig)
class WordPiecesBPE:
    """fairseq's interface: text to symbols with spaces between, and back."""

    def __init__(self, cfg: Any) -> None:
        self.pieces = WordPieces.of(cfg.word_pieces_vocab)

    def encode(self, x: str) -> str:
        """Text to symbols of the dictionary."""
        return " ".join(_UNKNOWN if piece == UNKNOWN else piece for piece in self.pieces.encode(x))

    def decode(self, x: str) -> str:
        """Symbols to text, in the case that the network knows."""
        return self.pieces.decode(x.split())

    def is_beginning_of_word(self, x: str) -> bool:
        """Whether the symbol begins a word."""
        return not x.startswith("##")
