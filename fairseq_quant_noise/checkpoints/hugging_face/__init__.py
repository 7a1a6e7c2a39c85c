"""Convert between Hugging Face's folders of RoBERTa and BERT and fairseq's checkpoints, without Hugging Face's code."""

from .from_folder import from_folder
from .to_folder import to_folder

__all__ = ["from_folder", "to_folder"]
