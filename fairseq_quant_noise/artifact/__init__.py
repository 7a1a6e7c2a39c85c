"""Write and read the packed file: safetensors with codes, centroids, dense tensors and a manifest, without pickle."""

from .dense import dense_state
from .manifest import FORMAT_VERSION, Manifest
from .packed import Packed, pack
from .reader import read
from .writer import write

__all__ = ["FORMAT_VERSION", "Manifest", "Packed", "dense_state", "pack", "read", "write"]
