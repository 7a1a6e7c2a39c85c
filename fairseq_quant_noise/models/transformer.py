"""Provide the documented import path of QuantNoiseTransformer."""

from ..plugin.models.transformer import QuantNoiseTransformer

__all__ = ["QuantNoiseTransformer"]
