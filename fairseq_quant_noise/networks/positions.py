"""Compute position numbers and sinusoidal positions as fairseq does, without fairseq.

It exists because a packed file holds no sinusoids and no numbering of its own.

Shapes: B batch, T tokens, C channels, P positions.
"""

import math
from collections.abc import MutableMapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .adaptive import new_embedding


def number_positions(tokens: Tensor, padding_idx: int) -> Tensor:
    """Number the words of each row from padding_idx + 1 on, skipping padding, which gets padding_idx.

    Args:
        tokens: (B, T) int64.
        padding_idx: the padding word.

    Returns:
        (B, T) int64.
    """
    word = tokens.ne(padding_idx).long()
    return word.cumsum(dim=1) * word + padding_idx


def frequencies(dim: int) -> Tensor:
    """Those of h = C // 2 sines, tensor2tensor's: frequency i is 10000 ** (-i / (h - 1)); (h,)."""
    half = dim // 2
    return torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))


def sinusoids(n_positions: int, dim: int, padding_idx: int) -> Tensor:
    """(P, C): sines in the first half of the channels, cosines in the second; zeros for padding."""
    half = dim // 2
    angles = torch.outer(torch.arange(n_positions).float(), frequencies(dim))  # (P, half)
    table = torch.zeros(n_positions, dim)
    table[:, :half] = angles.sin()
    table[:, half : 2 * half] = angles.cos()
    table[padding_idx] = 0
    return table


class SinusoidalPositions(nn.Module):
    """Sinusoidal positions of any number, with nothing in the state dict.

    The table is no buffer: it is built when first used, so that a network built on the meta device gets one.
    """

    def __init__(self, dim: int, padding_idx: int) -> None:
        super().__init__()
        self.dim = dim
        self.padding_idx = padding_idx
        self._table = torch.empty(0, dim)

    def forward(self, positions: Tensor) -> Tensor:
        """positions: (B, T) int64 -> (B, T, C) fp32; those of T tokens, or of more that `reach` was told of."""
        self.reach(positions.shape[1], positions.device)
        return F.embedding(positions, self._table)

    def reach(self, n_tokens: int, device: torch.device) -> None:
        """Make the table long enough for rows of so many tokens."""
        needed = self.padding_idx + 1 + n_tokens
        if self._table.shape[0] < needed or self._table.device != device:
            self._table = sinusoids(needed, self.dim, self.padding_idx).to(device)

    def _load_from_state_dict(self, state_dict: MutableMapping[str, Tensor], prefix: str, *args: object) -> None:
        """Drop the buffers that other versions of fairseq store here (0.12.2, git main)."""
        for name in ("weights", "_float_tensor"):
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def new_positions(learned_rows: int | None, dim: int, padding_idx: int) -> nn.Module:
    """Learned positions for so many tokens, or sinusoidal ones for any number of tokens.

    Args:
        learned_rows: the most tokens of a row; None: sinusoidal.
        dim: C.
        padding_idx: the padding word, which words are counted from.
    """
    if learned_rows is None:
        return SinusoidalPositions(dim, padding_idx)
    return new_embedding(learned_rows + padding_idx + 1, dim, padding_idx)


def check_length(n_tokens: int, option: str, most: int) -> None:
    """Raise UserError where a row has more tokens than there are learned positions; `option` is fairseq's name."""
    if n_tokens > most:
        raise UserError(f"{n_tokens} tokens exceed {option} {most}; cut the text into shorter pieces")
