"""Reading a packed file that may come from anywhere: its hash, then its header, then what the tensors hold."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from ..blocks import code_shape
from ..errors import DamagedFileError, UserError
from ..layers.quantized import CENTROIDS, CODES
from .manifest import METADATA_KEY, ZERO_HASH, Manifest, QuantizedTensor
from .packed import Packed

_MAX_HEADER = 100_000_000  # safetensors' own limit
_CHUNK = 1 << 20


def read(path: str | Path) -> Packed:
    """The content of a packed file, verified.

    Raises:
        UserError: there is no such file.
        DamagedFileError: it is not a packed file of a known version, or not whole.
    """
    path = Path(path)
    try:
        manifest = _read_manifest(path)
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        _check_tensors(manifest, tensors)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a packed file") from None
    except DamagedFileError as error:
        raise DamagedFileError(f"{path}: {error}") from None
    except safetensors.SafetensorError as error:
        raise DamagedFileError(f"{path}: not a whole safetensors file ({error}); copy it again") from None
    return Packed(tensors, manifest)


def _read_manifest(path: Path) -> Manifest:
    with open(path, "rb") as file:
        header = _read_header(file)
        try:
            metadata = json.loads(header)["__metadata__"][METADATA_KEY]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DamagedFileError("not a file of fairseq_quant_noise (its header has no manifest)") from None
        if not isinstance(metadata, str):
            raise DamagedFileError("its manifest is damaged (not text)")
        manifest, sha256 = Manifest.from_json(metadata)
        needle = b'\\"sha256\\":\\"'
        start = header.find(needle + sha256.encode("ascii", "replace"))
        if len(sha256) != len(ZERO_HASH) or start < 0:
            raise DamagedFileError("its manifest is damaged (no hash)")
        start += len(needle)
        blank = header[:start] + ZERO_HASH.encode() + header[start + len(ZERO_HASH) :]
        if _hash(file, blank) != sha256:
            raise DamagedFileError("its content does not match its SHA-256; copy or download it again")
    return manifest


def _read_header(file: BinaryIO) -> bytes:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise DamagedFileError("not a whole safetensors file (its header is longer than the file); copy it again")
    return file.read(length)


def _hash(file: BinaryIO, header: bytes) -> str:
    """SHA-256 of the file with `header` for its header; `file` stands after the header."""
    found = hashlib.sha256(len(header).to_bytes(8, "little") + header)
    while chunk := file.read(_CHUNK):
        found.update(chunk)
    return found.hexdigest()


def _check_tensors(manifest: Manifest, tensors: dict[str, Tensor]) -> None:
    for name, entry in manifest.tensors.items():
        codes, centroids = tensors.get(f"{name}.{CODES}"), tensors.get(f"{name}.{CENTROIDS}")
        if codes is None or centroids is None:
            raise DamagedFileError(f"tensor {name}: its codes or centroids are missing")
        _check_pq(name, entry, codes, centroids)
    for copy, owner in manifest.ties.items():
        if owner not in tensors and owner not in manifest.tensors:
            raise DamagedFileError(f"tensor {copy}: tied to {owner!r}, which is not in the file")


def _check_pq(name: str, entry: QuantizedTensor, codes: Tensor, centroids: Tensor) -> None:
    row = math.prod(entry.shape[1:])
    wrong: Any = None
    if row % entry.block_size or codes.dtype != torch.uint8 or centroids.dtype != torch.float16:
        wrong = "block size or dtype"
    elif tuple(codes.shape) != code_shape(entry.shape, entry.block_size):
        wrong = "codes' shape"
    elif tuple(centroids.shape) != (entry.n_centroids, entry.block_size):
        wrong = "centroids' shape"
    elif int(codes.max()) >= entry.n_centroids:
        wrong = f"a code beyond its {entry.n_centroids} centroids"
    elif not bool(torch.isfinite(centroids).all()):
        wrong = "a centroid that is not finite"
    if wrong:
        raise DamagedFileError(f"tensor {name}: damaged ({wrong})")
