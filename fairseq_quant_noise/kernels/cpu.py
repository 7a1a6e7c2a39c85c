"""The kernels in native/: compiled once for a machine, kept in the user's cache, called through ctypes.

Nothing is compiled when the package is installed. Where there is no compiler, or it fails, `takes` returns False and
`reference.py` is used; the log gives the reason once. Work is split among torch's own threads.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .tracing import in_graph

logger = logging.getLogger(__name__)

SWITCH = "FAIRSEQ_QUANT_NOISE_KERNELS"
SETTLED = "_settled"  # an attribute of centroids that nobody will change
_NATIVE = Path(__file__).with_name("native")
_WIDE = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()  # compilers prefer 256
_FLAGS = ("-O3", "-march=native", *_WIDE, "-std=c++17", "-fopenmp-simd", "-shared", "-fPIC")
_LANES = 16  # K is padded to a multiple of it


def takes(tensor: Tensor) -> bool:
    """Whether the compiled form takes this tensor, of any shape (…)."""
    fits = tensor.device.type == "cpu" and tensor.dtype in _LEAST
    return fits and (in_graph() or library() is not None)  # a graph's operators look again when they run


@functools.cache
def library() -> Any:
    """The compiled kernels, or None where they cannot be."""
    if os.environ.get(SWITCH) == "reference":
        return None
    try:
        kernels = ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home folder
        reason = str(getattr(error, "stderr", None) or error).strip()
        logger.info(f"no compiled kernels, plain torch serves: {reason.splitlines()[-1] if reason else type(error)}")
        return None
    declare(kernels)
    kernels.set_team(_team())
    return kernels


def declare(kernels: Any) -> None:
    """Tell ctypes the types of the kernels' arguments and results."""
    for name, arguments in _ARGUMENTS.items():
        getattr(kernels, name).argtypes, getattr(kernels, name).restype = arguments, _RESULTS.get(name)


def _team() -> int | None:
    """The address of OpenMP's `GOMP_parallel` in what torch has loaded; without it a kernel runs in one thread.

    Threads of our own would compete with torch's, which stay awake for a while after each of its operations.
    """
    try:
        torch_cpu = ctypes.CDLL(str(next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError, StopIteration):
        return None


def _compiled() -> Path:
    """The shared library for this source, compiler and processor; compiled if it is not in the cache yet."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("there is no C++ compiler (c++, g++, clang++, or $CXX)")
    sources, headers = sorted(_NATIVE.glob("*.cpp")), sorted(_NATIVE.glob("*.h"))
    texts = [path.read_bytes() for path in sources + headers]
    key = hashlib.sha256(b"\0".join([*texts, repr(_FLAGS).encode(), compiler.encode(), _processor().encode()]))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fairseq_quant_noise"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_own(folder.resolve(), stat.S_ISDIR):
        raise OSError(f"{folder} belongs to somebody else, or others can write to it")
    path = folder / f"kernels-{key.hexdigest()[:16]}.so"
    if not _is_own(path, stat.S_ISREG):
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            part = Path(beside) / path.name
            command = [compiler, *_FLAGS, "-o", str(part), *map(str, sources)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            os.chmod(part, 0o700)  # whatever the umask says
            os.replace(part, path)  # whole or not at all: other processes may be at the same
    return path


def _is_own(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether it is there, no link, and nobody else can have made or changed it: what is in it runs."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return kind(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by machines that differ."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(dict.fromkeys(found)) or f"{platform.machine()} {platform.processor()} {platform.node()}"


_LEAST = {torch.float32: "least_float", torch.float64: "least_double"}
_AT, _N = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = {
    "set_team": [_AT],
    "least_float": [_AT, _N, _N, _AT, _AT, _N, _AT, _N],
    "least_double": [_AT, _N, _N, _AT, _AT, _N, _AT, _N],
    "decode": [_AT, _N, _N, _AT, _N, _N, _N, _AT, _N],
    "decode_wide": [_AT, _N, _N, _AT, _N, _N, _N, _AT, _N],
    "linear": [_AT, _AT, _N, _AT, _AT, _N],
    "panel_rows": [],
    "linear_of_codes": [_AT, _N, _N, _AT, _AT, _N, _AT, _N, _AT, _AT, _N],
    "linear_of_centroids": [_AT, _N, _N, _N, _AT, _AT, _N, _AT, _AT, _AT, _AT, _N],
    "encoder_layer": [_AT, _N],
}
_RESULTS = {"linear": _N, "panel_rows": _N, "encoder_layer": _N}  # others have none


class Weight(ctypes.Structure):
    """A weight in codes, as native/product.h has it."""

    _fields_ = [
        ("codes", _AT),
        *((name, _N) for name in ("blocks", "d", "rows", "wide")),
        *((name, _AT) for name in ("centroids", "columns", "now", "seen")),
        ("count", _N),
        ("panel", _AT),
        ("fits_panel", _N),
    ]

    @classmethod
    def of(cls, codes: Tensor, d: int, wide: bool, centroids: tuple[Tensor, Tensor]) -> "Weight":
        """Of codes (I/d, O), contiguous, and the `tables` of centroids; the tensors have to live as long."""
        return cls(codes.data_ptr(), *(codes.shape[0], d, codes.shape[1], wide), *(t.data_ptr() for t in centroids))

    @property
    def inner(self) -> int:
        """I."""
        return int(self.blocks * self.d)


def least(points: Tensor, slope: Tensor, bias: Tensor) -> Tensor:
    """As `reference.least`, for (n, d), (d, K) and (K,), all float32 or all float64: (n,) int64."""
    points, (d, k) = points.contiguous(), slope.shape
    padded = -(-k // _LANES) * _LANES
    rows = torch.zeros(d, padded, dtype=points.dtype)  # (d, K)
    rows[:, :k] = slope
    ends = torch.full((padded,), torch.inf, dtype=points.dtype)  # (K,): what is padded is never least
    ends[:k] = bias
    out = torch.empty(len(points), dtype=torch.long)
    getattr(library(), _LEAST[points.dtype])(
        *(points.data_ptr(), len(points), d, rows.data_ptr(), ends.data_ptr(), padded, out.data_ptr()),
        torch.get_num_threads(),
    )
    return out


def decode(codes: Tensor, centroids: Tensor) -> Tensor:
    """As `kernels.decode`, for codes (O, I/d) uint8 or int32 and centroids (K, d) float32: (O, I)."""
    (rows, blocks), d = codes.shape, centroids.shape[1]
    out = centroids.new_empty(rows, blocks * d)
    wide, codes = _typed(codes, centroids)
    (library().decode_wide if wide else library().decode)(
        *(codes.data_ptr(), *codes.stride(), tables(centroids)[0].data_ptr(), d, rows, blocks, out.data_ptr()),
        torch.get_num_threads(),
    )
    return out


def linear(x: Tensor, codes: Tensor, centroids: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `kernels.linear`, for x (..., I), codes (I/d, O), centroids (K, d) and bias (O,), float32: (..., O).

    A few rows of x go by tables: the products of its blocks with all centroids, then sums of entries. With few
    centroids and many rows of the weight, that is far less work than the product: I K + O I/d, not O I. A small weight,
    for which it is not, is read row by row. With more rows of x, or of centroids than a byte tells apart, the weight is
    decoded a piece at a time. None makes a dense copy.
    """
    wide, codes = _typed(codes, centroids)
    x, codes, added = x.contiguous(), codes.contiguous(), _contiguous(bias)
    out = x.new_empty(*x.shape[:-1], codes.shape[1])
    weight = Weight.of(codes, centroids.shape[1], wide, tables(centroids))
    n = x.numel() // weight.inner
    library().linear(
        ctypes.addressof(weight), x.data_ptr(), n, _pointer(added), out.data_ptr(), torch.get_num_threads()
    )
    return out


def linear_of_codes(
    x: Tensor, codes: Tensor, affine: Tensor, bias: Tensor | None = None, grid: Tensor | None = None
) -> Tensor:
    """As `kernels.linear_of_codes`, for x (..., I), codes (O, I), affine (2, C), bias (O,) and grid (2,): (..., O)."""
    (rows, inner), x, codes, affine = codes.shape, x.contiguous(), codes.contiguous(), affine.contiguous()
    out, bias = x.new_empty(*x.shape[:-1], rows), _contiguous(bias)
    library().linear_of_codes(
        *(x.data_ptr(), x.numel() // inner, inner, _pointer(grid), codes.data_ptr(), rows),
        *(affine.data_ptr(), affine.shape[1], _pointer(bias), out.data_ptr(), torch.get_num_threads()),
    )
    return out


def linear_of_centroids(
    x: Tensor,
    codes: Tensor,
    centroids: Tensor,
    affine: Tensor,
    bias: Tensor | None = None,
    grid: Tensor | None = None,
) -> Tensor:
    """As `kernels.linear_of_centroids`, for x (..., I), codes (I/d, O), centroids (256, d), affine (2, 1): (..., O)."""
    (blocks, rows), d = codes.shape, centroids.shape[1]
    x, codes, affine, bias = x.contiguous(), codes.contiguous(), affine.contiguous(), _contiguous(bias)
    out = x.new_empty(*x.shape[:-1], rows)
    library().linear_of_centroids(
        *(x.data_ptr(), x.numel() // (blocks * d), blocks, d, _pointer(grid), codes.data_ptr(), rows),
        *(centroids.data_ptr(), affine.data_ptr(), _pointer(bias), out.data_ptr(), torch.get_num_threads()),
    )
    return out


def _typed(codes: Tensor, centroids: Tensor) -> tuple[bool, Tensor]:
    """Whether K is above what a byte tells apart, and the codes in the type of that form, as they are wherever made."""
    wide = len(centroids) > 256
    dtype = torch.int32 if wide else torch.uint8
    return wide, codes if codes.dtype == dtype else codes.to(dtype)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def tables(centroids: Tensor) -> tuple[Tensor, Tensor]:
    """(256, d) and (d, 256): a centroid for every code that a byte can be, zeros beyond K; 4096 of them for a larger K.

    So no code reads past the end. Kept on the tensor while its numbers are what they were, or for ever (`SETTLED`).
    """
    kept: tuple[Tensor, Tensor] | None = getattr(centroids, "_all_codes", None)
    settled = getattr(centroids, SETTLED, False)
    if kept is None or not (settled or torch.equal(kept[0][: len(centroids)], centroids)):
        many = 256 if len(centroids) <= 256 else 4096  # as codes.h has it
        rows = torch.zeros(many, centroids.shape[1], dtype=centroids.dtype)
        rows[: len(centroids)] = centroids
        kept = rows, rows.t().contiguous()
        centroids._all_codes = kept  # type: ignore[attr-defined]
    return kept
