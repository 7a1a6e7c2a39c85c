"""Quant-Noise while training: which blocks are hit, what happens to them, and how a model gets it."""

from .attach import attach_rules, detach_noise, fitted_rules, noise_of
from .distortions import DISTORTIONS

__all__ = ["DISTORTIONS", "attach_rules", "detach_noise", "fitted_rules", "noise_of"]
