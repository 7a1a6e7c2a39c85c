"""Scalar quantization, int2 to int8: ranges, affine codes, activations."""

from .affine import BITS, Affine, fake_quantize
from .ranges import RANGES, fit_affine

__all__ = ["BITS", "RANGES", "Affine", "fake_quantize", "fit_affine"]
