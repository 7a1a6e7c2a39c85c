"""Provide the documented import path of QuantNoiseEfficientNet."""

from ..plugin.models.efficientnet import QuantNoiseEfficientNet

__all__ = ["QuantNoiseEfficientNet"]
