"""The packed file: one small safetensors file with codes, centroids, the rest, and a manifest. Nothing is unpickled."""

from .dense import dense_state
from .manifest import FORMAT_VERSION, Manifest
from .packed import Packed, pack
from .reader import read
from .writer import write

__all__ = ["FORMAT_VERSION", "Manifest", "Packed", "dense_state", "pack", "read", "write"]
