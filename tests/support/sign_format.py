"""A format to test the registry with: signs and one magnitude a row, W_hat = m_row * sign(W), m the mean |w| of a row.

The file of `layers/` that CONTRIBUTING.md speaks of looks like this; no other file of the package knows it.
"""

import math

import torch

from fairseq_quant_noise.errors import UserError
from fairseq_quant_noise.layers.parts import CODES
from fairseq_quant_noise.layers.quantized import QuantizedWeight, dense_weight, swap_in
from fairseq_quant_noise.layers.registry import register
from fairseq_quant_noise.utils.bits import unpack_bits

MAGNITUDE = "magnitude"


@register("sign")
class SignWeight(QuantizedWeight):
    """A weight in signs."""

    scheme = "sign"
    plan_schemes = file_schemes = (scheme,)
    entries = needs = file_parts = (CODES, MAGNITUDE)
    full_precision = (MAGNITUDE,)
    dtype = torch.float32

    def __init__(self, codes, magnitude):
        """codes: uint8 of the weight's shape, 1 for numbers >= 0; magnitude: (rows,) float32."""
        super().__init__()
        self.register_buffer(CODES, codes)
        self.register_buffer(MAGNITUDE, magnitude)
        self.shape = codes.shape

    def decode(self):
        rows = self.magnitude.view(-1, *[1] * (self.codes.dim() - 1))
        return torch.where(self.codes.bool(), rows, -rows)

    def parts(self):
        return {CODES: self.codes, MAGNITUDE: self.magnitude}

    @classmethod
    def of(cls, dense):
        return cls((dense >= 0).to(torch.uint8), dense.float().abs().flatten(1).mean(1))

    # A plan

    @classmethod
    def quantize_(cls, weight, scheme, range_):
        quantized = cls.of(dense_weight(weight).detach())
        swap_in(weight, quantized)
        return quantized

    @classmethod
    def seen(cls, name, dense, scheme, range_):
        if not bool(dense.isfinite().all()):
            raise UserError(f"{name}: holds NaN or infinity")
        return cls.of(dense.detach()).decode()

    # A state

    @classmethod
    def adopt(cls, weight, parts):
        if tuple(parts[CODES].shape) != weight.shape:
            raise UserError(f"{weight.name}: signs of shape {tuple(parts[CODES].shape)} do not fit {weight.shape}")
        if isinstance(weight.stored, SignWeight):
            return False
        swap_in(weight, cls(*(torch.empty_like(parts[p], device=weight.stored.device) for p in cls.entries)))
        return True

    @classmethod
    def dense(cls, parts):
        return cls(parts[CODES], parts[MAGNITUDE]).decode()

    @classmethod
    def dense_shape(cls, parts):
        return tuple(parts[CODES].shape)

    # A packed file

    @classmethod
    def describes(cls, entry):
        return entry.to_dict().keys() == {"scheme", "shape"}

    @classmethod
    def code_bits(cls, entry):
        return 1

    @classmethod
    def size(cls, entry):
        return math.prod(entry.shape) / 8

    @classmethod
    def file_types(cls, entry):
        return {CODES: torch.uint8, MAGNITUDE: torch.float32}

    @classmethod
    def wrong(cls, entry, parts):
        if not entry.holds(parts[CODES]) or tuple(parts[MAGNITUDE].shape) != (entry.shape[0],):
            return "signs' or magnitudes' shape"
        return None if bool(parts[MAGNITUDE].isfinite().all()) else "a magnitude that is not finite"

    @classmethod
    def unpack(cls, entry, parts, codebook):
        codes = unpack_bits(parts[CODES], entry.n_codes, entry.code_bits)
        return {CODES: codes.view(entry.shape), MAGNITUDE: parts[MAGNITUDE]}
