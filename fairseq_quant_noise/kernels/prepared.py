"""A weight in codes made ready for products: one native call (native/product.cpp) checks that it still is, then works.

A product of a small layer takes some ten microseconds, so what need not be done at each call is done once: checks, the
tables of centroids, the structure that the kernel reads. Of a small weight it also keeps the decoded weight.
"""

import ctypes
import threading
from typing import Any

import torch
from torch import Tensor

from . import cpu

#: Rows times row length of a weight whose decoded numbers are kept, in float16, once it is multiplied by 2 to 12 rows:
#: 512 KiB at most, which fit a second-level cache beside the rest.
LARGEST_PANEL = 1 << 18
_DECODING = threading.Lock()  # a panel is made once, since others may read it without Python's lock
_DONE, _WANTS_PANEL = 1, 2  # what the kernel answers


class Prepared:
    """What a product needs of a weight: made by `of`."""

    __slots__ = ("_address", "_bias", "_held", "_kernel", "_places", "_weight", "codes", "inner", "panel", "rows")

    @classmethod
    def of(cls, codes: Tensor, centroids: Tensor, seen: Tensor, rounded: Tensor) -> "Prepared | None":
        """Of a weight on a CPU that has the compiled kernels, in float32; else None.

        Args:
            codes: (O, I/d) uint8, or int32 where K is above 256; a column lies together.
            centroids: (K, d); they may change, and a product notices.
            seen: (K, d), a copy of them, which stays.
            rounded: (K, d), what they are multiplied as; it stays too.
        """
        wide = len(centroids) > 256
        floats = centroids.dtype == torch.float32 and centroids.is_contiguous() and seen.is_contiguous()
        laid_out = codes.dim() == 2 and codes.t().is_contiguous() and not codes.is_inference()
        fits = floats and laid_out and codes.dtype == (torch.int32 if wide else torch.uint8)
        return cls(codes, centroids, seen, rounded) if fits and cpu.takes(centroids) and codes.is_cpu else None

    def __init__(self, codes: Tensor, centroids: Tensor, seen: Tensor, rounded: Tensor) -> None:
        wide, tables, count = len(centroids) > 256, cpu.tables(rounded), seen.numel()
        self._weight = cpu.Weight.of(codes.t(), seen.shape[1], wide, tables)
        self._weight.now, self._weight.seen, self._weight.count = centroids.data_ptr(), seen.data_ptr(), count
        # Aliases, so that nothing else comes to lie at these addresses.
        self._held, self._places = (seen, tables, centroids.detach()), (codes.data_ptr(), centroids.data_ptr())
        self.codes = codes, codes._version
        self._bias: tuple[Any, int | None] = None, None
        self.rows, self.inner = len(codes), self._weight.inner
        self.panel: Tensor | None = None
        self._weight.fits_panel = self._fits(rounded, wide)
        self._address, self._kernel = ctypes.addressof(self._weight), cpu.library().linear

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Nothing, None, of copies and pickles: their tensors lie elsewhere."""
        return type(None), ()

    def linear(self, x: Tensor, codes: Any, centroids: Any, bias: Any) -> Tensor | None:
        """x W^T + bias for (..., I), gradients off: (..., O).

        None where x is no plain float32 tensor of a CPU, or codes (O, I/d) or centroids (K, d) are no longer what this
        was made of.
        """
        shape = x.shape
        plain = type(x) is Tensor and x.dtype is torch.float32 and x.is_cpu  # fake ones have no numbers
        if not (plain and len(shape) and shape[-1] == self.inner):
            return None
        x = x.contiguous()
        known, version = self.codes
        if codes is not known or codes._version != version:
            return None
        if (codes.data_ptr(), centroids.data_ptr()) != self._places or (found := self._bias_at(bias)) is None:
            return None
        n = shape[0] if len(shape) == 2 else x.numel() // self.inner
        if n == 0:
            return None
        out = x.new_empty((n, self.rows) if len(shape) == 2 else (*shape[:-1], self.rows))
        arguments = self._address, x.data_ptr(), n, found[1], out.data_ptr(), torch.get_num_threads()
        answer = self._kernel(*arguments)
        if answer == _WANTS_PANEL:
            self._decode()
            answer = self._kernel(*arguments)
        return out if answer == _DONE else None

    def _bias_at(self, bias: Any) -> "tuple[Any, int | None] | None":
        """The bias (O,), or None, with its address; None where the kernel cannot read it."""
        known = self._bias
        if bias is known[0] and (bias is None or bias.data_ptr() == known[1]):
            return known
        if bias is None:
            found: tuple[Any, int | None] = None, None
        elif bias.dtype != torch.float32 or not bias.is_cpu or bias.shape != (self.rows,) or not bias.is_contiguous():
            return None
        else:
            found = bias, bias.data_ptr()
        self._bias = found
        return found

    def _fits(self, rounded: Tensor, wide: bool) -> bool:
        """Whether the decoded weight may be kept: it is small, and exact in float16."""
        beside = cpu.library().panel_rows()
        if wide or not beside or self.rows % beside or self.rows * self.inner > LARGEST_PANEL:
            return False
        return torch.equal(rounded.half().float(), rounded)

    def _decode(self) -> None:
        beside = cpu.library().panel_rows()
        with _DECODING, torch.inference_mode(False):
            if self.panel is not None:  # by another thread meanwhile, which may be reading it
                return
            weight = cpu.decode(self.codes[0], self._held[1][0]).half()  # (O, I)
            self.panel = _aligned(weight.view(-1, beside, self.inner).transpose(1, 2))  # (O / beside, I, beside)
            self._weight.panel = self.panel.data_ptr()


def _aligned(tensor: Tensor) -> Tensor:
    """A contiguous copy that starts at a multiple of 64 bytes."""
    room = torch.empty(tensor.numel() + 32, dtype=tensor.dtype)
    start = -room.data_ptr() % 64 // tensor.element_size()
    return room[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
