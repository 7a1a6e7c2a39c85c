"""Provide the documented import path of QuantNoiseRoberta."""

from ..plugin.models.roberta import QuantNoiseRoberta

__all__ = ["QuantNoiseRoberta"]
