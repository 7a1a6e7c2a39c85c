"""Read a packed file from an untrusted source: check its header, its hash, then the content of its tensors.

The file is read once, and what was hashed is what is used: it may change on disk afterwards. Until everything is
checked, that takes twice the file's bytes at most, and a few megabytes.
"""

import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
from torch import Tensor

from ..errors import DamagedFileError, UserError, is_about_a_file
from ..layers.parts import LATENT
from ..layers.registry import FORMATS, QuantizedTensor
from .configuration import check_configuration
from .limits import check_sizes, longest_header
from .manifest import METADATA_KEY, ZERO_HASH, Manifest, parse_json
from .packed import Packed

SUFFIX = ".safetensors"  # the plugin recognises a packed file by it

_MAX_COPIES = 1_000_000  # tensors that ties and shared layers stand for: a small file must not ask for much memory
#: What safetensors and torch raise for a file whose header is no sound description of its bytes.
_UNSOUND = (safetensors.SafetensorError, AssertionError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)


def read(path: str | Path) -> Packed:
    """The content of a packed file, verified.

    Raises:
        UserError: the file cannot be read, is a device or a pipe, or is larger than the memory that is left.
        DamagedFileError: it is not a packed file of a known version, or not whole.
    """
    path = Path(path)
    try:
        return _read(path)
    except OSError as error:
        if not is_about_a_file(error):
            raise
        raise UserError(f"{path}: {error.strerror}; give the path of a packed file") from None
    except MemoryError:
        raise UserError(f"{path}: is larger than the memory that is left; read it on a larger machine") from None
    except DamagedFileError as error:
        raise DamagedFileError(f"{path}: {error}") from None


def _read(path: Path) -> Packed:
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # which would never end; a folder is refused by open
        raise UserError(f"{path}: is a device or a pipe; copy it to a file first")
    with open(path, "rb") as file:
        header = _read_header(file)
        manifest, blank = _read_manifest(header)
        file.seek(0)
        content = file.read(os.fstat(file.fileno()).st_size)
    if _hash(content, blank) != manifest[1]:
        raise DamagedFileError("its content does not match its SHA-256; copy or download it again")
    packed = Packed(_tensors(content), manifest[0])
    _check_names(packed)
    _check_tensors(packed)
    check_sizes(packed, len(content))
    check_configuration(packed.manifest.model)
    return packed


def _read_manifest(header: bytes) -> tuple[tuple[Manifest, str], bytes]:
    """The manifest with the hash it gives, and the header with zeros in the hash's place."""
    try:
        metadata = parse_json(header.decode())["__metadata__"][METADATA_KEY]
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
    return (manifest, sha256), header[:start] + ZERO_HASH.encode() + header[start + len(ZERO_HASH) :]


def _read_header(file: BinaryIO) -> bytes:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size == 0:
        raise DamagedFileError("is empty; copy it again")
    if size < 8 or not 2 <= length <= size - 8:
        if length.to_bytes(8, "little").startswith((b"PK", b"\x80")):
            raise DamagedFileError(
                "a PyTorch file, not a packed one; `fairseq-quant-noise quantize` or `export` makes one"
            )
        raise DamagedFileError("not a whole packed file (its header is longer than the file); copy it again")
    if length > longest_header(size):
        raise DamagedFileError(f"not a file of fairseq_quant_noise (a header of {length:,} bytes in {size:,})")
    return file.read(length)


def _hash(content: bytes, header: bytes) -> str:
    """SHA-256 of the file with `header` for its header."""
    found = hashlib.sha256(content[:8] + header)
    found.update(memoryview(content)[8 + len(header) :])
    return found.hexdigest()


def _tensors(content: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except _UNSOUND as error:
        raise DamagedFileError(f"not a whole safetensors file ({error}); copy it again") from None


def _check_names(packed: Packed) -> None:
    """Check that no tensor is hidden or stored twice, and that ties and layer maps lead to stored tensors."""
    manifest, stored = packed.manifest, packed.tensors
    if not all(name.isprintable() for name in stored):
        raise DamagedFileError("its header is damaged (a name that is not plain text)")
    uses = sum(map(len, manifest.layers.values()))
    copies = len(manifest.ties) + uses * len(stored)
    if copies > _MAX_COPIES:
        raise DamagedFileError(f"its manifest is damaged (ties and layers in use stand for {copies:,} tensors)")
    logical = {*manifest.tensors, *packed.dense_names}
    for copy, owner in packed.ties.items():
        if owner not in logical:
            raise DamagedFileError(f"tensor {copy}: tied to {owner!r}, which is not in the file")
        if copy in logical or copy in stored:
            raise DamagedFileError(f"tensor {copy}: is in the file, and tied to {owner!r} as well")
    for stack, layers in manifest.layers.items():
        missing = [j for j in set(layers) if not any(name.startswith(f"{stack}.{j}.") for name in stored)]
        if missing:
            raise DamagedFileError(f"layer {stack}.{missing[0]}: is in use, and not in the file")
    _check_forms(packed)


def _check_forms(packed: Packed) -> None:
    """Check that no dense tensor, tied or not, is named like a part of a quantized one that the manifest omits."""
    forms = [[part for part in format.needs if part != LATENT] for format in FORMATS.values()]
    names, quantized = {*packed.dense_names, *packed.ties}, {*packed.manifest.tensors}
    quantized |= {copy for copy, owner in packed.ties.items() if owner in quantized}
    for name in names:
        owner, _, last = name.rpartition(".")
        unlisted = any(last in parts and all(f"{owner}.{part}" in names for part in parts) for parts in forms)
        if unlisted or owner in quantized or name in packed.manifest.tensors:
            raise DamagedFileError(f"tensor {name}: is in the file in two forms, or is not listed in its manifest")


def _check_tensors(packed: Packed) -> None:
    for name, entry in packed.manifest.tensors.items():
        wrong = _wrong(entry, packed.parts_of(name))
        if wrong:
            raise DamagedFileError(f"tensor {name}: damaged ({wrong})")


def _wrong(entry: QuantizedTensor, parts: dict[str, Tensor]) -> str | None:
    """What is wrong with the stored parts of a quantized tensor, or None."""
    needed = entry.format.file_types(entry)
    if {part: tensor.dtype for part, tensor in parts.items()} != needed:
        return "its parts are not " + ", ".join(f"{part} ({dtype})" for part, dtype in needed.items())
    return entry.format.wrong(entry, parts)


def is_packed(path: str | Path) -> bool:
    """Whether `path` names a packed file, by its ending."""
    return str(path).endswith(SUFFIX)
