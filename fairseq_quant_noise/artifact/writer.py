"""Write a packed file, whole or not at all."""

import hashlib
import json
from pathlib import Path

import safetensors.torch

from ..errors import UserError
from ..layers.registry import QuantizedTensor
from ..utils.files import replace_file
from .configuration import check_configuration
from .limits import check_sizes, longest_header
from .manifest import METADATA_KEY, ZERO_HASH, Manifest
from .packed import Packed


def write(packed: Packed, path: str | Path) -> int:
    """Write `packed` to `path`, replacing a file that is there only once the new one is on disk.

    Returns:
        The bytes of the file.

    Raises:
        UserError: the folder is missing, unwritable or full; or `read` would refuse the file.
    """
    content = serialize(packed)
    _check_limits(packed, content)
    replace_file(path, content)
    return len(content)


def serialize(packed: Packed) -> bytearray:
    """The bytes of the file. The same model gives the same bytes."""
    content = bytearray(safetensors.torch.save(packed.tensors, metadata={METADATA_KEY: packed.manifest.to_json()}))
    # The hash is of the file with the hash zero; in the header the manifest's quotes are escaped.
    needle = b'\\"sha256\\":\\"' + ZERO_HASH.encode()
    at = content.index(needle) + len(needle) - len(ZERO_HASH)
    content[at : at + len(ZERO_HASH)] = hashlib.sha256(content).hexdigest().encode()
    return content


def header_bytes(name: str, entry: QuantizedTensor | None) -> int:
    """Bytes of the header that a tensor takes, within a few: where it lies, and what the manifest says of it.

    Args:
        name: the tensor's.
        entry: how it is stored; None for a dense one.
    """
    parts = [name] if entry is None else [f"{name}.{part}" for part in entry.format.file_types(entry)]
    places = {part: {"dtype": "F32", "shape": [1000, 100], "data_offsets": [1 << 20, 1 << 20]} for part in parts}
    manifests = Manifest("", tensors={} if entry is None else {name: entry}), Manifest("")
    more, less = (len(json.dumps(manifest.to_json())) for manifest in manifests)
    return len(json.dumps(places, separators=(",", ":"))) + more - less


def _check_limits(packed: Packed, content: bytearray) -> None:
    """Refuse to write a file that `read` would refuse. Raises UserError."""
    try:
        length = int.from_bytes(content[:8], "little")
        if length > longest_header(len(content)):
            raise UserError(f"the names of its {len(packed.tensors):,} tensors take {length:,} bytes, too many")
        check_sizes(packed, len(content))
        check_configuration(packed.manifest.model)
    except UserError as error:
        raise UserError(f"this network cannot be a packed file: {error}") from None
