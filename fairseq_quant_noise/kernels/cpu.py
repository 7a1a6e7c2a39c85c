"""The kernels of cpu.cpp: compiled once for a machine, kept in the user's cache, called through ctypes.

Nothing is compiled when the package is installed. Where there is no compiler, or it fails, `takes` says no and the
reference serves; the log says why, once. Work is split among as many threads as torch has.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SWITCH = "FAIRSEQ_QUANT_NOISE_KERNELS"
_SOURCE = Path(__file__).with_name("cpu.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")
_LANES = 16  # K is padded to a multiple of it
_MOST_BY_TABLES = 4  # rows of x: with more, a table for each costs more than decoding the weight once
_PIECE = 1 << 19  # numbers of a weight that are decoded at a time: 2 MB
_POINTS, _LOOKUPS, _NUMBERS = 1 << 14, 1 << 21, 1 << 20  # of one thread at a time: less is not worth a hand-over


def takes(tensor: Tensor) -> bool:
    """Whether the compiled form is there for this tensor; never where torch compiles, which sees into torch alone."""
    fits = tensor.device.type == "cpu" and tensor.dtype in _NEAREST and not torch.compiler.is_compiling()
    return fits and library() is not None


@functools.cache
def library() -> Any:
    """The compiled kernels, or None where they cannot be."""
    if os.environ.get(SWITCH) == "reference":
        return None
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home folder
        reason = str(getattr(error, "stderr", None) or error).strip()
        logger.info(f"no compiled kernels, plain torch serves: {reason.splitlines()[-1] if reason else type(error)}")
        return None


def _compiled() -> Path:
    """The shared library for this source, compiler and processor; compiled if it is not in the cache yet."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("there is no C++ compiler (c++, g++, clang++, or $CXX)")
    source = _SOURCE.read_bytes()
    key = hashlib.sha256(b"\0".join([source, repr(_FLAGS).encode(), compiler.encode(), _processor().encode()]))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fairseq_quant_noise"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise OSError(f"{folder} belongs to somebody else")
    path = folder / f"kernels-{key.hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            part = Path(beside) / path.name
            command = [compiler, *_FLAGS, "-o", str(part), str(_SOURCE)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            os.replace(part, path)  # whole or not at all: other processes may be at the same
    return path


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by machines that differ."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(dict.fromkeys(found)) or f"{platform.machine()} {platform.processor()} {platform.node()}"


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """ctypes releases the interpreter's lock, so Python's threads do. A forked process needs its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="kernels")


def _in_threads(run: Any, size: int, chunk: int) -> None:
    """`run(start, end)` over [0, size), in chunks whose bounds do not depend on the number of threads."""
    starts = range(0, size, chunk)
    threads = min(torch.get_num_threads(), len(starts))
    if threads <= 1:
        run(0, size)
        return
    list(_pool(threads, os.getpid()).map(lambda start: run(start, min(start + chunk, size)), starts))


_NEAREST = {torch.float32: "nearest_float", torch.float64: "nearest_double"}


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """See `kernels.nearest`."""
    points, k = points.contiguous(), len(centroids)
    d, padded = points.shape[1], -(-k // _LANES) * _LANES
    slope = torch.zeros(d, padded, dtype=points.dtype)  # (d, K)
    slope[:, :k] = centroids.t() * -2
    bias = torch.full((padded,), torch.inf, dtype=points.dtype)  # (K,): what is padded is never least
    bias[:k] = centroids.square().sum(1)
    out = torch.empty(len(points), dtype=torch.long)
    kernel, size = getattr(library(), _NEAREST[points.dtype]), points.element_size()

    def run(start: int, end: int) -> None:
        kernel(
            _at(points, start * d * size),
            *(ctypes.c_int64(end - start), ctypes.c_int64(d)),
            *(_at(slope), _at(bias), ctypes.c_int64(padded)),
            _at(out, start * out.element_size()),
        )

    _in_threads(run, len(points), _POINTS)
    return out


def decode(codes: Tensor, centroids: Tensor) -> Tensor:
    """See `kernels.decode`."""
    return _decode_into(centroids.new_empty(codes.shape[0], codes.shape[1] * centroids.shape[1]), codes, centroids)


def _decode_into(out: Tensor, codes: Tensor, centroids: Tensor) -> Tensor:
    (rows, blocks), d, centroids = codes.shape, centroids.shape[1], _all_codes(centroids)[0]
    kernel, (by_row, by_block) = library().decode, codes.stride()

    def run(start: int, end: int) -> None:
        kernel(
            _at(codes, start * by_row),
            *(ctypes.c_int64(by_row), ctypes.c_int64(by_block), _at(centroids), ctypes.c_int64(d)),
            *(ctypes.c_int64(end - start), ctypes.c_int64(blocks), _at(out, start * blocks * d * 4)),
        )

    _in_threads(run, rows, max(32, _NUMBERS // (blocks * d)))
    return out


def linear(x: Tensor, codes: Tensor, centroids: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `kernels.linear`: by tables for a few rows, else by decoding a piece of the weight at a time."""
    return (_by_tables if x.numel() <= _MOST_BY_TABLES * x.shape[-1] else _by_pieces)(x, codes, centroids, bias)


def _by_pieces(x: Tensor, codes: Tensor, centroids: Tensor, bias: Tensor | None) -> Tensor:
    """A piece fits the cache, and there is never a dense copy of the weight."""
    rows, flat = codes.shape[1], x.reshape(-1, x.shape[-1])
    piece = max(_PIECE // x.shape[-1], 64)
    buffer, out = x.new_empty(min(piece, rows), x.shape[-1]), x.new_empty(len(flat), rows)
    for start in range(0, rows, piece):
        end = min(start + piece, rows)
        weight = _decode_into(buffer[: end - start], codes[:, start:end].t(), centroids)
        if bias is None:
            torch.mm(flat, weight.t(), out=out[:, start:end])
        else:
            torch.addmm(bias[start:end], flat, weight.t(), out=out[:, start:end])
    return out.view(*x.shape[:-1], rows)


def _by_tables(x: Tensor, codes: Tensor, centroids: Tensor, bias: Tensor | None) -> Tensor:
    """For each row of x a table of its blocks' products with all centroids, then sums of entries.

    With few centroids and many rows of the weight, that is far less work than the product: I K + O I/d, not O I.
    """
    d, (blocks, rows) = centroids.shape[1], codes.shape
    x, columns = x.contiguous(), _all_codes(centroids)[1]
    n = x.numel() // (blocks * d)
    out = x.new_zeros(n, rows) if bias is None else bias.repeat(n, 1)
    kernel = library().lookup

    def run(start: int, end: int) -> None:
        for i in range(n):
            kernel(
                *(_at(x, i * blocks * d * 4), ctypes.c_int64(blocks), ctypes.c_int64(d), _at(columns)),
                *(_at(codes, start), ctypes.c_int64(rows), ctypes.c_int64(end - start)),
                _at(out, (i * rows + start) * 4),
            )

    _in_threads(run, rows, max(1024, _LOOKUPS // blocks))
    return out.view(*x.shape[:-1], rows)


def _all_codes(centroids: Tensor) -> tuple[Tensor, Tensor]:
    """(256, d) and (d, 256): a centroid for every code that a byte can be, zeros beyond K.

    So no code reads past the end. Kept on the tensor while its numbers are what they were.
    """
    kept: tuple[Tensor, Tensor] | None = getattr(centroids, "_all_codes", None)
    if kept is None or not torch.equal(kept[0][: len(centroids)], centroids):
        rows = torch.zeros(256, centroids.shape[1], dtype=centroids.dtype)
        rows[: len(centroids)] = centroids
        kept = rows, rows.t().contiguous()
        centroids._all_codes = kept  # type: ignore[attr-defined]
    return kept


def _at(tensor: Tensor, offset: int = 0) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() + offset)
