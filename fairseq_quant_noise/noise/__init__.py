"""Quant-Noise in training: which blocks are hit, how they are distorted, and how a model gets its noise."""

from .attach import attach_rules, detach_noise, fitted_rules, noise_of
from .distortions import DISTORTIONS

__all__ = ["DISTORTIONS", "attach_rules", "detach_noise", "fitted_rules", "noise_of"]
