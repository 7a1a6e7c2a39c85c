"""Tabulate a plan applied to a model, one row per tensor with its size by the paper's accounting: a dry run.

The paper counts (arXiv 2004.07320, section 7.4 and table 1; MiB = bytes / 2^20), for a weight of n blocks:

    pq          n * log2(K) / 8 bytes of codes, K * d * 2 bytes of centroids (fp16; K * d for int8 ones); the
                centroids of a shared codebook once, with its first weight
    intN        N / 8 bytes a number; scales do not count
    the rest    4 bytes a number (fp32), biases and norms included; but where every weight is of one scheme intN,
                the rest counts N / 8 bytes a number too (its 236 and 118 MB are the dense model's 942 by 4 and by 8).
                2 bytes where the plan says `dense: fp16`, which the paper does not have

It works on the meta device, so that the sizes of a model cost nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..accounting import rest_bits
from ..layers import QuantizedWeight
from ..weights.discovery import find_weights
from .targets import Target


@dataclass(frozen=True)
class Row:
    """One tensor of the model."""

    name: str
    scheme: str  # pq, int2 ... int8, or dense
    shape: tuple[int, ...]
    block_size: int | None
    n_centroids: int | None
    bytes: float  # the paper's accounting; 0 for a tied copy
    tied_to: str | None  # the tensor that stores it

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self) | {"shape": list(self.shape)}


@dataclass(frozen=True)
class Table:
    """All tensors of a model under a plan."""

    rows: list[Row]
    original_bytes: int | None = None  # dense bytes before layers were shared or pruned
    latent_bytes: int = 0  # of the latent weights in fp32, that tuning keeps where codes train

    @property
    def parameters(self) -> int:
        """Number of parameters of the dense model; tied ones count once."""
        return sum(math.prod(r.shape) for r in self.rows if r.tied_to is None)

    @property
    def dense_bytes(self) -> int:
        """Size of the dense model: 4 bytes a parameter."""
        return 4 * self.parameters

    @property
    def paper_bytes(self) -> float:
        """Size of the quantized model by the paper's accounting, in bytes."""
        return sum(r.bytes for r in self.rows)

    def ratio_of(self, dense_bytes: int) -> float:
        """Compression ratio: `dense_bytes` over the quantized model's bytes."""
        return dense_bytes / self.paper_bytes if self.paper_bytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The table as plain values: the keys of `plan --json`."""
        return {
            "parameters": self.parameters,
            "dense_bytes": self.dense_bytes,
            "paper_bytes": self.paper_bytes,
            "ratio": self.ratio_of(self.dense_bytes),
            "original_bytes": self.original_bytes or self.dense_bytes,
            "original_ratio": self.ratio_of(self.original_bytes or self.dense_bytes),
            "latent_bytes": self.latent_bytes,
            "tensors": [row.to_dict() for row in self.rows],
        }


def make_table(
    model: nn.Module,
    targets: Sequence[Target] = (),
    original_bytes: int | None = None,
    codes_train: bool = False,
    dense_bits: int = 32,
) -> Table:
    """A row for each parameter of `model` (tied copies included), quantized as `targets` say, dense elsewhere.

    Args:
        model: any network, on the meta device too.
        targets: as `resolve_stages` returns them.
        original_bytes: size of the dense model before its layers were shared or pruned.
        codes_train: whether the plan says `codes: train`.
        dense_bits: of a number without codes, as the plan says; of what is dense in the end, not of `dense_bytes`.
    """
    by_name = {t.weight.tensor_name: t for t in targets}
    first = {id(t.weight.parameter): t.weight.tensor_name for t in targets}  # the owner, whichever holder comes first
    schemes = [by_name[w.tensor_name].rule.scheme if w.tensor_name in by_name else "dense" for w in find_weights(model)]
    rest = rest_bits(schemes, dense_bits)
    rows = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape = tuple(parameter.shape)
        owner = first.setdefault(id(parameter), name)
        target = by_name.get(owner)
        if target is None:
            row = Row(name, "dense", shape, None, None, math.prod(shape) * rest / 8, None)
        else:
            d, k = target.block_size, target.n_centroids
            row = Row(name, target.rule.scheme, shape, d, k, target.paper_bytes, None)
        rows.append(row if owner == name else _tied(row, owner))
    latent = [math.prod(t.weight.shape) for t in targets if codes_train and t.rule.format.has_codebook]
    return Table(rows, original_bytes, 4 * sum(latent))


def _tied(row: Row, owner: str) -> Row:
    return Row(row.name, row.scheme, row.shape, row.block_size, row.n_centroids, 0.0, owner)


def model_bytes(model: nn.Module, dense_bits: int = 32) -> tuple[float, int]:
    """(bytes now, bytes if all were dense): quantized weights as `table.py` counts them, `dense_bits` elsewhere."""
    stored = [weight.stored for weight in find_weights(model)]
    quantized = [s for s in stored if isinstance(s, QuantizedWeight)]
    inside = {id(p) for weight in quantized for p in weight.parameters()}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    schemes = [s.scheme if isinstance(s, QuantizedWeight) else "dense" for s in stored]
    now = rest * rest_bits(schemes, dense_bits) / 8 + sum(weight.paper_bytes for weight in quantized)
    return now, 4 * (rest + sum(weight.shape.numel() for weight in quantized))
