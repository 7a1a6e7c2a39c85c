"""Scalar quantization, int2 to int8: ranges, affine codes, activations."""

from .affine import BITS, SCHEMES, Affine, bits_of, fake_quantize
from .ranges import RANGES, fit_affine

__all__ = ["BITS", "RANGES", "SCHEMES", "Affine", "bits_of", "fake_quantize", "fit_affine"]
