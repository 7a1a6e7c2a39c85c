"""Provide the documented import path of QuantNoiseTransformerLanguageModel."""

from ..plugin.models.transformer_lm import QuantNoiseTransformerLanguageModel

__all__ = ["QuantNoiseTransformerLanguageModel"]
