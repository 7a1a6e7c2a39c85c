"""Scalar quantization, int2 to int8: ranges, affine codes, activations."""

from .affine import BITS, SCHEMES, Affine, bits_of, fake_quantize, is_affine
from .ranges import INPUT_RANGES, LEARNED_RANGES, RANGES, STAGE_RANGES, by_channel, fit_affine

__all__ = [
    "BITS",
    "INPUT_RANGES",
    "LEARNED_RANGES",
    "RANGES",
    "SCHEMES",
    "STAGE_RANGES",
    "Affine",
    "bits_of",
    "by_channel",
    "fake_quantize",
    "fit_affine",
    "is_affine",
]
