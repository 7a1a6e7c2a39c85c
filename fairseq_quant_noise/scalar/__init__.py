"""Scalar quantization, int2 to int8: ranges, affine codes, activations."""

from .affine import BITS, SCHEMES, Affine, bits_of, fake_quantize, is_affine
from .ranges import INPUT_RANGES, RANGES, fit_affine

__all__ = ["BITS", "INPUT_RANGES", "RANGES", "SCHEMES", "Affine", "bits_of", "fake_quantize", "fit_affine", "is_affine"]
