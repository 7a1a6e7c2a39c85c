"""Causal self-attention under fairseq's names, without fairseq.

It exists so that a packed file runs where fairseq is not installed. The four projections are called as
modules: each reads its own `weight` (noised, or decoded from codes) at use. Dropout is left alone.

Shapes: B batch, T tokens, C channels, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Multi-head attention of every token to itself and the tokens before it."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B, T, C) -> (B, T, C).

        Args:
            mask: None for plain causal attention, or what `causal_mask` returns.
        """
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)  # (B, H, T, C/H)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, H, T, C/H)."""
        return x.unflatten(2, (self.n_heads, -1)).transpose(1, 2)


def causal_mask(padding: Tensor) -> Tensor | None:
    """Which keys each query may see: those up to itself that are no padding.

    Args:
        padding: (B, T) bool, True where a token is padding.

    Returns:
        (B, 1, T, T) bool, or None where no token is padding.
    """
    if not padding.any():
        return None
    length = padding.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=padding.device).tril()
    return causal & ~padding[:, None, None, :]
