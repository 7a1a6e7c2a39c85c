"""Print the results of the verbs: a table for people, JSON for programs."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..accounting import MIB
from ..artifact import Packed
from ..artifact.inspection import inspection
from ..plan.vocabulary import DENSE_BITS
from ..quantization.table import Table


def print_table(table: Table) -> None:
    """Print a plan's dry run: one row per tensor, and the totals."""
    rows = [
        (r.name, r.scheme, _shape(r.shape), r.block_size, r.n_centroids, f"{r.bytes:,.0f}", _tie(r.tied_to))
        for r in table.rows
    ]
    print(format_rows(("tensor", "scheme", "shape", "d", "K", "bytes", ""), rows))
    info = table.to_dict()
    print(
        f"{table.parameters:,} parameters; {table.dense_bytes / MIB:.2f} MiB dense, "
        f"{table.paper_bytes / MIB:.2f} MiB by the paper's accounting (x{info['ratio']:.2f})"
    )
    if info["original_bytes"] != info["dense_bytes"]:
        print(
            f"{info['original_bytes'] / MIB:.2f} MiB dense before layers were shared or pruned "
            f"(x{info['original_ratio']:.2f})"
        )
    if table.latent_bytes:
        print(
            f"codes: train keeps {table.latent_bytes / MIB:.2f} MiB of latent weights while the network is tuned, and "
            f"the optimizer its state of them (Adam's is {2 * table.latent_bytes / MIB:.2f} MiB); the file is unchanged"
        )


def print_inspection(path: str | Path, packed: Packed, as_json: bool = False) -> None:
    """Print what a packed file on disk contains."""
    info = inspection(path, packed)
    if as_json:
        print(json.dumps(info))
        return
    rows = [
        (
            t["name"],
            "dense, fp16" if t["dense_bits"] == DENSE_BITS["fp16"] else t["scheme"],
            _shape(t["shape"]),
            t["block_size"],
            t["n_centroids"],
            f"{t['bytes']:,}",
            None if t["entropy"] is None else f"{t['entropy']:.2f} of {t['code_bits']}",
            _tie(t["tied_to"]),
        )
        for t in info["tensors"]
    ]
    print(format_rows(("tensor", "scheme", "shape", "d", "K", "bytes", "entropy, bits", ""), rows))
    print(
        f"{path}: {info['file_bytes'] / MIB:.3f} MiB on disk ({info['file_bytes']:,} bytes), "
        f"{info['paper_bytes'] / MIB:.3f} MiB by the paper's accounting, "
        f"{info['dense_bytes'] / MIB:.2f} MiB dense, x{info['ratio']:.2f}"
    )
    if info["code_bytes"]:
        share = 1 - info["entropy_bytes"] / info["code_bytes"]
        print(f"codes: {info['code_bytes']:,.0f} bytes, of which an entropy coder could save {share:.1%}")


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "1"


def _tie(tied_to: str | None) -> str:
    return f"tied to {tied_to}" if tied_to else ""


def format_rows(header: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    """Format rows as columns of text, each as wide as its widest entry."""
    lines = [tuple("" if cell is None else str(cell) for cell in row) for row in [header, *rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
