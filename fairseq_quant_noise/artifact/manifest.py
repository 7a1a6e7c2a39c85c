"""The manifest: what a packed file says about itself, in JSON, under the only key of safetensors' `__metadata__`.

    {"format_version": 1, "producer": "fairseq_quant_noise 0.1.0",
     "model":   {"architecture": ..., "cfg": {...}, "vocab_size": ..., "padding_idx": ...}   or {} for any other module,
     "plan":    {...},
     "tensors": {"decoder.layers.0.fc1.weight": {"scheme": "pq", "shape": [512, 128], "block_size": 8, ...}, ...},
     "ties":    {"decoder.output_projection.weight": "decoder.embed_tokens.weight"},
     "sha256":  "<64 hexadecimal digits>"}

`tensors` lists the quantized tensors; tensor NAME of scheme pq is stored as NAME.codes (U8) and NAME.centroids (F16),
every other tensor under its own name, as it was. `sha256` is the hash of the whole file with these 64 digits zero.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import DamagedFileError

FORMAT_VERSION = 1
METADATA_KEY = "fairseq_quant_noise"
ZERO_HASH = "0" * 64


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor that is stored in a quantized form."""

    scheme: str  # pq
    shape: tuple[int, ...]  # of the dense tensor
    block_size: int  # d
    n_centroids: int  # K


@dataclass(frozen=True)
class Manifest:
    """The content of the manifest, but for the version and the hash."""

    producer: str
    model: dict[str, Any] = field(default_factory=dict)  # how to build the network; {} when only the caller knows
    plan: dict[str, Any] = field(default_factory=dict)  # that made the file
    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)  # quantized tensors by name
    ties: dict[str, str] = field(default_factory=dict)  # tied copy -> the tensor in store

    def to_json(self, sha256: str = ZERO_HASH) -> str:
        """One line, sorted keys: the same manifest gives the same bytes."""
        content = asdict(self) | {"format_version": FORMAT_VERSION, "sha256": sha256}
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> tuple["Manifest", str]:
        """The manifest and the hash of the file.

        Raises:
            DamagedFileError: not JSON, an unknown version, or fields of the wrong type.
        """
        try:
            content = json.loads(text)
            version = content.pop("format_version")
            sha256 = content.pop("sha256")
            if version != FORMAT_VERSION:
                raise DamagedFileError(
                    f"format version {version!r} is unknown here (this package reads {FORMAT_VERSION}); "
                    "update fairseq_quant_noise"
                )
            tensors = {name: _quantized_tensor(entry) for name, entry in content.pop("tensors").items()}
            manifest = cls(**{f.name: content.pop(f.name) for f in fields(cls) if f.name != "tensors"}, tensors=tensors)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, DamagedFileError):
                raise
            raise DamagedFileError(f"its manifest is damaged ({type(error).__name__}: {error})") from None
        _check_types(manifest, sha256)
        return manifest, sha256


def _quantized_tensor(entry: Any) -> QuantizedTensor:
    tensor = QuantizedTensor(**(entry | {"shape": tuple(entry["shape"])}))
    numbers = (*tensor.shape, tensor.block_size, tensor.n_centroids)
    if tensor.scheme != "pq" or len(tensor.shape) < 2 or not all(type(n) is int and n > 0 for n in numbers):
        raise DamagedFileError(f"its manifest is damaged (a tensor entry {entry!r} that no version writes)")
    return tensor


def _check_types(manifest: Manifest, sha256: Any) -> None:
    mappings = (manifest.model, manifest.plan, manifest.ties)
    if not all(isinstance(m, dict) for m in mappings):
        raise DamagedFileError("its manifest is damaged (a field of the wrong type)")
    names = [*manifest.tensors, *manifest.ties, *manifest.ties.values(), manifest.producer, sha256]
    if not all(isinstance(name, str) and name.isprintable() for name in names):
        raise DamagedFileError("its manifest is damaged (a name that is not plain text)")
