"""Implement adaptive input and adaptive softmax under fairseq's names, without fairseq.

The vocabulary is cut into bands of falling frequency; band i is embedded in `dim // factor**i` dimensions
(Baevski and Auli, arXiv 1809.10853; Grave et al., arXiv 1609.04309). A packed file that holds fairseq's
tensors loads into these modules by name. Fairseq's training loss (a band at a time, by target) is left alone.

Shapes: B batch, T tokens, N = B*T, C channels, D channels of a band, W words of a band, K tails, V words.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..weights.access import register_linear


def bands(cutoffs: Sequence[int], vocab_size: int) -> list[tuple[int, int]]:
    """First word and end of every band: cutoffs (20, 60) of 100 words are (0, 20), (20, 60), (60, 100)."""
    ends = list(cutoffs) if cutoffs[-1] == vocab_size else [*cutoffs, vocab_size]
    return list(pairwise([0, *ends]))


def new_embedding(n_rows: int, dim: int, padding_idx: int | None) -> nn.Embedding:
    """An embedding of fairseq's initial scale: standard deviation 1 / sqrt(dim), zeros for padding."""
    embedding = nn.Embedding(n_rows, dim, padding_idx)
    embedding.weight.data.mul_(dim**-0.5)
    return embedding


@register_linear
class TiedLinear(nn.Module):
    """A Linear without bias that shares the Parameter of another module, as it is or transposed."""

    def __init__(self, weight: Tensor, transpose: bool = False) -> None:
        super().__init__()
        self.weight = weight
        self.transpose = transpose

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out); the weight is (out, in), or (in, out) if `transpose`."""
        weight = self.weight
        return F.linear(x, weight.t() if self.transpose else weight)


class AdaptiveInput(nn.Module):
    """An embedding whose rarer words have fewer dimensions, each band projected to C channels.

    Args:
        vocab_size: V.
        padding_idx: the padding word, in the first band.
        initial_dim: D of the first band.
        factor: how much narrower each band is than the one before.
        output_dim: C.
        cutoffs: where each band but the last ends.
    """

    def __init__(
        self,
        vocab_size: int,
        padding_idx: int,
        initial_dim: int,
        factor: float,
        output_dim: int,
        cutoffs: Sequence[int],
    ) -> None:
        super().__init__()
        self.bands = bands(cutoffs, vocab_size)
        self.embedding_dim = output_dim
        self.embeddings = nn.ModuleList()
        for i, (start, end) in enumerate(self.bands):
            dim = int(initial_dim // factor**i)
            words = new_embedding(end - start, dim, padding_idx if i == 0 else None)
            self.embeddings.append(nn.Sequential(words, nn.Linear(dim, output_dim, bias=False)))
        self.register_buffer("_float_tensor", torch.zeros(1))  # fairseq's; here it holds the dtype of the output

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T) int64 -> (B, T, C)."""
        flat = tokens.reshape(-1)  # (N,)
        out = self._float_tensor.new_zeros(flat.numel(), self.embedding_dim)  # type: ignore[operator]
        for (start, end), band in zip(self.bands, self.embeddings, strict=True):
            rows = ((flat >= start) & (flat < end)).nonzero().squeeze(1)
            if rows.numel():
                out = out.index_copy(0, rows, band(flat[rows] - start).to(out.dtype))
        return out.view(*tokens.shape, self.embedding_dim)

    def band(self, i: int) -> tuple[nn.Embedding, nn.Linear]:
        """The embedding, of weight (W, D), and the projection, of weight (C, D), of band i."""
        embedding, projection = self.embeddings[i].children()
        return cast(nn.Embedding, embedding), cast(nn.Linear, projection)


class TiedHead(nn.Module):
    """The head of an adaptive softmax whose words are the first band of an adaptive input."""

    def __init__(self, words: Tensor, n_tails: int) -> None:
        super().__init__()
        self.word_proj = TiedLinear(words)
        self.class_proj = nn.Linear(words.shape[1], n_tails, bias=False)
        self.register_buffer("_float_tensor", torch.zeros(1))  # fairseq's, without a use here

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C) -> (..., W + K): the scores of the first band's words, then one of each tail."""
        return torch.cat([self.word_proj(x), self.class_proj(x)], dim=-1)


class AdaptiveSoftmax(nn.Module):
    """log p(word) = log p(band) + log p(word | band), with narrower projections for rarer bands.

    Args:
        vocab_size: V.
        input_dim: C.
        cutoffs: where the head and each tail but the last end.
        factor: how much narrower each tail is than the band before.
        tied: the adaptive input whose embeddings this uses, or None.
        tie_proj: with `tied`, use its projections too, transposed.
    """

    def __init__(
        self,
        vocab_size: int,
        input_dim: int,
        cutoffs: Sequence[int],
        factor: float,
        tied: AdaptiveInput | None = None,
        tie_proj: bool = False,
    ) -> None:
        super().__init__()
        (_, self.head_words), *tails = bands(cutoffs, vocab_size)
        self.head: nn.Module
        if tied is None:
            self.head = nn.Linear(input_dim, self.head_words + len(tails), bias=False)
        else:
            self.head = TiedHead(tied.band(0)[0].weight, len(tails))
        self.tail = nn.ModuleList()
        for i, (start, end) in enumerate(tails, 1):
            if tied is None:
                self.tail.append(_free_tail(input_dim, int(input_dim // factor**i), end - start))
            else:
                self.tail.append(_tied_tail(*tied.band(i), tie_proj))
        self.register_buffer("version", torch.tensor([1]))

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities of every word: x (B, T, C) -> (B, T, V)."""
        head = F.log_softmax(self.head(x), dim=-1)  # (B, T, W + K)
        parts = [head[..., : self.head_words]]
        for i, tail in enumerate(self.tail):
            prior = head[..., self.head_words + i, None]  # (B, T, 1)
            parts.append(F.log_softmax(tail(x), dim=-1) + prior)  # (B, T, W)
        return torch.cat(parts, dim=-1)


def _free_tail(input_dim: int, dim: int, words: int) -> nn.Sequential:
    """(..., C) -> (..., W); the middle place, fairseq's dropout, keeps its names."""
    return nn.Sequential(nn.Linear(input_dim, dim, bias=False), nn.Identity(), nn.Linear(dim, words, bias=False))


def _tied_tail(embedding: nn.Embedding, projection: nn.Linear, tie_proj: bool) -> nn.Sequential:
    """As `_free_tail`, sharing the (W, D) of `embedding` and, if `tie_proj`, the (C, D) of `projection`."""
    into_band: nn.Module
    if tie_proj:
        into_band = TiedLinear(projection.weight, transpose=True)
    else:
        into_band = nn.Linear(projection.out_features, projection.in_features, bias=False)
    return nn.Sequential(into_band, nn.Identity(), TiedLinear(embedding.weight))
