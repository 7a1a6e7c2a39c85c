"""Define the manifest of a packed file: JSON under the only key of safetensors' `__metadata__`.

    {"format_version": 3, "producer": "fairseq_quant_noise 0.1.0",
     "model":   {"architecture": ..., "cfg": {...}, "vocab_size": ..., "padding_idx": ...}   or {} for any other module,
     "plan":    {...},
     "tensors": {"decoder.layers.0.fc1.weight": {"scheme": "pq", "shape": [512, 128], "block_size": 8, ...}, ...},
     "ties":    {"decoder.output_projection.weight": "decoder.embed_tokens.weight"},
     "layers":  {"decoder.layers": [0, 0, 2, 2]},
     "inputs":  {"decoder.layers.0.fc1": {"bits": 8, "low": -1.5, "high": 2.25}, ...},
     "sha256":  "<64 hexadecimal digits>"}

`tensors` lists the quantized tensors. Tensor NAME is stored, codes packed as `utils/bits.py` says, as

    scheme pq     NAME.codes (U8), NAME.centroids (F16); with centroid_bits 8: U8, and NAME.affine (F32, (2, 1));
                  with "codebook": OTHER, the codes alone: centroids and affine are those of the tensor OTHER
    scheme intN   NAME.codes (U8), NAME.affine (F32, (2, channels)): scales, then zero points
    "transposed"  true: what is stored is the tensor with its first two dimensions exchanged, and so is `shape`

and every other tensor under its own name, as it was; with `"dense": "F32"`, those of type F16 stand for F32. `ties`
are tensors that another one stores; `layers` are stacks whose layers share their weights: for each layer in use the
number of the layer that stores its tensors. `inputs` are the modules whose input is rounded to codes, and their
ranges. `sha256` is the hash of the whole file with these 64 digits zero.
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NoReturn

from ..errors import DamagedFileError
from ..layers.registry import QuantizedTensor
from ..scalar import BITS

FORMAT_VERSION = 7  # that of a file whose dense tensors are in fp16, and the network's in fp32
_WIDE = 6  # that of a file with codes of more than 8 bits, as before dense tensors were in fp16
_TRANSPOSED = 5  # that of a file with transposed tensors, as before codes had more than 8 bits
_SHARED = 4  # that of a file with shared codebooks, as before there were transposed tensors
_PLAIN = 3  # that of any other file, as before there were shared codebooks
_KNOWN = (_PLAIN, _SHARED, _TRANSPOSED, _WIDE, FORMAT_VERSION)
METADATA_KEY = "fairseq_quant_noise"
ZERO_HASH = "0" * 64
HALVED = "F32"  # the type in the network of dense tensors that are stored in F16
_LARGEST = 3.4e38  # the largest end of an input's range: a float32


@dataclass(frozen=True)
class Manifest:
    """The content of the manifest, except for the version and the hash."""

    producer: str
    model: dict[str, Any] = field(default_factory=dict)  # how to build the network; {} when only the caller knows
    plan: dict[str, Any] = field(default_factory=dict)  # that made the file
    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)  # quantized tensors by name
    ties: dict[str, str] = field(default_factory=dict)  # tied copy -> the tensor in store
    layers: dict[str, list[int]] = field(default_factory=dict)  # by stack: for each layer in use the one in store
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)  # by module: bits and range of its input
    dense: str = ""  # HALVED where dense tensors in F16 stand for F32; else every dense tensor is as it was

    @property
    def format_version(self) -> int:
        """The lowest format version that supports everything in the file."""
        if self.dense:
            return FORMAT_VERSION
        if any(entry.code_bits > 8 for entry in self.tensors.values()):
            return _WIDE
        if any(entry.transposed for entry in self.tensors.values()):
            return _TRANSPOSED
        return _SHARED if any(entry.codebook for entry in self.tensors.values()) else _PLAIN

    @property
    def is_pruned(self) -> bool:
        """Whether the plan took layers out."""
        structure = self.plan.get("structure")
        return isinstance(structure, dict) and structure.get("keep_layers") is not None

    def to_json(self, sha256: str = ZERO_HASH) -> str:
        """One line, sorted keys: the same manifest gives the same bytes."""
        tensors = {name: entry.to_dict() for name, entry in self.tensors.items()}
        content = asdict(self)
        if not self.dense:  # as before there was this key
            del content["dense"]
        content |= {"tensors": tensors, "format_version": self.format_version, "sha256": sha256}
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> tuple["Manifest", str]:
        """The manifest and the hash of the file.

        Raises:
            DamagedFileError: `text` is not JSON, of an unknown version, or has fields of the wrong type.
        """
        try:
            content = parse_json(text)
            version = content.pop("format_version")
            sha256 = content.pop("sha256")
            if type(version) is not int or version not in _KNOWN:
                raise DamagedFileError(
                    f"format version {version!r} is unknown here (this package reads {_PLAIN} to {FORMAT_VERSION}); "
                    "update fairseq_quant_noise"
                )
            tensors = {name: _quantized_tensor(entry) for name, entry in content.pop("tensors").items()}
            others = {f.name: content.pop(f.name) for f in fields(cls) if f.name not in ("tensors", "dense")}
            if content.get("dense", HALVED) != HALVED:
                raise DamagedFileError(f"its manifest is damaged (dense tensors of type {content['dense']!r})")
            manifest = cls(**others, tensors=tensors, dense=content.pop("dense", ""))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, DamagedFileError):
                raise
            raise DamagedFileError(f"its manifest is damaged ({type(error).__name__}: {error})") from None
        _check_types(manifest, sha256)
        _check_codebooks(manifest, version)
        return manifest, sha256


def parse_json(text: str) -> Any:
    """Parse JSON by the standard: no key twice, and only finite numbers.

    Raises:
        ValueError: the text is not such JSON.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_each_key_once, parse_constant=_no_number, parse_float=_finite)


def _each_key_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key twice")
    return content


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _quantized_tensor(entry: dict[str, Any]) -> QuantizedTensor:
    tensor = QuantizedTensor(**(entry | {"shape": tuple(entry["shape"])}))
    tensor.check()
    return tensor


def _check_codebooks(manifest: Manifest, version: int) -> None:
    """Check that each shared codebook is stored with a tensor that owns it, with equal d, K and centroid bits."""
    if version != manifest.format_version:
        raise DamagedFileError(f"its manifest is damaged (version {version}, which such a file does not have)")
    for name, entry in manifest.tensors.items():
        owner = manifest.tensors.get(entry.codebook or name)
        if owner is None or owner.codebook is not None and entry.codebook is not None:
            raise DamagedFileError(f"tensor {name}: damaged (its codebook {entry.codebook!r} is not in the file)")
        same = ("block_size", "n_centroids", "centroid_bits")
        if any(getattr(owner, key) != getattr(entry, key) for key in same):
            raise DamagedFileError(f"tensor {name}: damaged (its codebook {entry.codebook!r} has other centroids)")


def _check_types(manifest: Manifest, sha256: object) -> None:
    mappings = [manifest.model, manifest.plan, manifest.ties, manifest.layers, manifest.inputs]
    mappings += manifest.inputs.values() if isinstance(manifest.inputs, dict) else []
    if not all(isinstance(m, dict) for m in mappings):
        raise DamagedFileError("its manifest is damaged (a field of the wrong type)")
    for entry in manifest.inputs.values():
        low, high, bits = entry.get("low"), entry.get("high"), entry.get("bits")
        ends = type(low) is float and type(high) is float and -_LARGEST <= low <= high <= _LARGEST
        if not ends or type(bits) is not int or bits not in BITS:
            raise DamagedFileError("its manifest is damaged (a range of inputs that no version writes)")
    for stored in manifest.layers.values():
        numbers = isinstance(stored, list) and all(type(j) is int for j in stored)
        if not numbers or not all(0 <= j <= i and stored[j] == j for i, j in enumerate(stored)):
            raise DamagedFileError("its manifest is damaged (a map of layers that no version writes)")
    names = [
        *manifest.inputs,
        *manifest.layers,
        *manifest.tensors,
        *manifest.ties,
        *manifest.ties.values(),
        manifest.producer,
        sha256,
    ]
    if not all(isinstance(name, str) and name.isprintable() for name in names):
        raise DamagedFileError("its manifest is damaged (a name that is not plain text)")
