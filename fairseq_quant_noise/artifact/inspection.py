"""Describe the content of a packed file as plain data, one row per tensor."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..accounting import rest_bits
from ..plan.vocabulary import DENSE_BITS
from .codebooks import CodebookUse, codebook_use
from .packed import Packed


def inspection(path: str | Path, packed: Packed, uses: Sequence[CodebookUse] | None = None) -> dict[str, Any]:
    """The keys of `inspect --json`; `uses` are those of `codebook_use`, where they are known.

    `ratio` is dense bytes over bytes on disk; `code_bytes` are those of all codes, and `entropy_bytes` what they would
    take at their entropy (`codebooks.py`).
    """
    manifest = packed.manifest
    rest = rest_bits(entry.scheme for entry in manifest.tensors.values())
    found = {use.tensor: use for use in (codebook_use(packed) if uses is None else uses)}
    rows = [_row(packed, name, None, use=found.get(name)) for name in manifest.tensors]
    rows += [_row(packed, name, None, min(rest, _bits(packed, name))) for name in packed.dense_names]
    rows += [_row(packed, copy, owner) for copy, owner in packed.ties.items()]
    file_bytes = Path(path).stat().st_size
    dense_bytes = sum(4 * math.prod(r["shape"]) for r in rows if r["tied_to"] is None)
    return {
        "format_version": manifest.format_version,
        "file_bytes": file_bytes,
        "paper_bytes": sum(r["paper_bytes"] for r in rows),
        "dense_bytes": dense_bytes,
        "ratio": dense_bytes / file_bytes,
        "code_bytes": sum(use.codes * manifest.tensors[name].code_bits for name, use in found.items()) / 8,
        "entropy_bytes": sum(use.codes * use.entropy for use in found.values()) / 8,
        "producer": manifest.producer,
        "model": manifest.model.get("architecture"),
        "plan": manifest.plan,
        "inputs": manifest.inputs,
        "tensors": sorted(rows, key=lambda r: r["name"]),
    }


def _bits(packed: Packed, name: str) -> int:
    """Bits of a number in the file of a tensor without codes; of a network in fp16 they count as its 32."""
    return DENSE_BITS["fp16" if packed.is_halved(name) else "fp32"]


def _row(
    packed: Packed, name: str, tied_to: str | None, rest: int = 32, use: CodebookUse | None = None
) -> dict[str, Any]:
    entry = packed.manifest.tensors.get(tied_to or name)
    dense = None if entry else packed.tensors[tied_to or name]
    shape = list(entry.shape) if entry else list(dense.shape)  # type: ignore[union-attr]
    return {
        "name": name,
        "scheme": entry.scheme if entry else "dense",
        "dense_bits": None if entry else _bits(packed, tied_to or name),  # stored, of each number
        "shape": shape,
        "block_size": entry.block_size if entry else None,
        "n_centroids": entry.n_centroids if entry else None,
        "bytes": 0 if tied_to else packed.tensor_bytes(name),
        "paper_bytes": 0.0 if tied_to else entry.paper_bytes if entry else math.prod(shape) * rest / 8,
        "code_bits": entry.code_bits if entry and use else None,  # stored, of each code
        "entropy": use.entropy if use else None,  # bits a code
        "tied_to": tied_to,
    }
