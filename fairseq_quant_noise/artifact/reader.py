"""Reading a packed file that may come from anywhere: its hash, then its header, then what the tensors hold."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import BinaryIO

import safetensors
import torch
from torch import Tensor

from ..errors import DamagedFileError, UserError
from ..layers.pq import CENTROIDS, CODES
from ..layers.scalar import AFFINE
from .bits import packed_size, unpack_bits
from .manifest import METADATA_KEY, ZERO_HASH, Manifest, QuantizedTensor
from .packed import PARTS, Packed

_MAX_HEADER = 100_000_000  # safetensors' own limit
_CHUNK = 1 << 20
_MAX_COPIES = 1_000_000  # tensors that shared layers stand for: a small file must not ask for much memory


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
        packed = Packed(tensors, manifest)
        _check_layers(packed)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a packed file") from None
    except DamagedFileError as error:
        raise DamagedFileError(f"{path}: {error}") from None
    except safetensors.SafetensorError as error:
        raise DamagedFileError(f"{path}: not a whole safetensors file ({error}); copy it again") from None
    return packed


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
        parts = {part: tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in tensors}
        wrong = _wrong(entry, parts)
        if wrong:
            raise DamagedFileError(f"tensor {name}: damaged ({wrong})")
    for copy, owner in manifest.ties.items():
        if owner not in tensors and owner not in manifest.tensors:
            raise DamagedFileError(f"tensor {copy}: tied to {owner!r}, which is not in the file")


def _check_layers(packed: Packed) -> None:
    for stack, stored in packed.manifest.layers.items():
        missing = [j for j in set(stored) if not any(name.startswith(f"{stack}.{j}.") for name in packed.tensors)]
        if missing:
            raise DamagedFileError(f"layer {stack}.{missing[0]}: is in use, and not in the file")
    copies = max(map(len, packed.manifest.layers.values()), default=0) * len(packed.tensors)
    if copies > _MAX_COPIES:
        raise DamagedFileError(f"its manifest is damaged (layers in use stand for {copies:,} tensors)")


def _wrong(entry: QuantizedTensor, parts: dict[str, Tensor]) -> str | None:
    """What is wrong with the stored parts of a quantized tensor, or None."""
    needed = {CODES: torch.uint8}
    if entry.bits is None:
        needed[CENTROIDS] = torch.float16 if entry.centroid_bits == 16 else torch.uint8
    if entry.bits is not None or entry.centroid_bits == 8:
        needed[AFFINE] = torch.float32
    if {part: tensor.dtype for part, tensor in parts.items()} != needed:
        return "its parts are not " + ", ".join(f"{part} ({dtype})" for part, dtype in needed.items())
    channels = (1,) if entry.bits is None else (1, entry.shape[0])
    if math.prod(entry.shape[1:]) % (entry.block_size or 1) or entry.channels not in channels:
        return "block size or channels"
    if tuple(parts[CODES].shape) != (packed_size(entry.n_codes, entry.code_bits),):
        return "codes' shape"
    if AFFINE in parts and not _is_affine(parts[AFFINE], entry):
        return "scales or zero points"
    return _wrong_codebook(entry, parts) if entry.n_centroids is not None else None


def _wrong_codebook(entry: QuantizedTensor, parts: dict[str, Tensor]) -> str | None:
    k, centroids = entry.n_centroids or 0, parts[CENTROIDS]
    if tuple(centroids.shape) != (k, entry.block_size):
        return "centroids' shape"
    if k < 2**entry.code_bits and int(unpack_bits(parts[CODES], entry.n_codes, entry.code_bits).max()) >= k:
        return f"a code beyond its {k} centroids"
    if centroids.is_floating_point() and not bool(torch.isfinite(centroids).all()):
        return "a centroid that is not finite"
    return None


def _is_affine(both: Tensor, entry: QuantizedTensor) -> bool:
    if tuple(both.shape) != (2, entry.channels):
        return False
    scale, zero_point = both
    top = 2 ** (entry.bits or entry.centroid_bits) - 1
    whole = (zero_point == zero_point.round()) & (zero_point >= 0) & (zero_point <= top)
    return bool(((scale * (top + 1)).isfinite() & (scale > 0) & whole).all())
