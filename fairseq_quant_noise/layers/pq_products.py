"""The products of a weight as a codebook and codes: which form multiplies, and what is prepared for it."""

import torch
from torch import Tensor

from ..kernels import Prepared, in_graph, linear, linear_of_centroids, takes_integers, takes_linear
from .inputs import GRID
from .parts import CENTROIDS, CODES
from .quantized import QuantizedWeight


class PQProducts(QuantizedWeight):
    """Mixed into a product-quantized weight (`pq.py`), which has these attributes."""

    codes: Tensor  # (rows, blocks a row)
    bits: int  # of a centroid's number
    _turned: tuple[Tensor, Tensor] | None
    _prepared: Prepared | None
    _stored: tuple[Tensor, Tensor] | None

    @property
    def n_centroids(self) -> int:
        """K.

        Raises:
            NotImplementedError: the weight does not override it.
        """
        raise NotImplementedError

    def stored_centroids(self) -> Tensor:
        """The centroids (K, d) as the file holds them.

        Raises:
            NotImplementedError: the weight does not override it.
        """
        raise NotImplementedError

    def centroids_in_bytes(self) -> tuple[Tensor, Tensor]:
        """The 8-bit centroids (256, d) uint8, and their scale and zero point (2, 1).

        Raises:
            NotImplementedError: the weight does not override it.
        """
        raise NotImplementedError

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x W^T + bias for (..., I): (..., O); None where `multiplies` says no."""
        prepared = self._prepared
        if prepared is not None and not in_graph() and not torch.is_grad_enabled():
            found = prepared.linear(x, self._buffers[CODES], self._parameters[CENTROIDS], bias)
            if found is not None:
                return found
        return super().product(x, bias)

    def train(self, mode: bool = True) -> "PQProducts":
        """As nn.Module's; what was prepared for products goes once there is training."""
        if mode:
            self._prepared = None
        return super().train(mode)

    def multiplies(self, x: Tensor) -> bool:
        """Whether `linear` takes x (..., I): gradients are off, the weight is (O, I), and codes are faster."""
        settled, centroids = not torch.is_grad_enabled() and len(self.shape) == 2, self._parameters[CENTROIDS]
        settled = settled and x.dim() > 0 and x.shape[-1] == self.shape[1]
        return settled and (self.in_integers(x) or takes_linear(x, centroids))  # type: ignore[arg-type]

    def in_integers(self, x: Tensor) -> bool:
        """Whether `linear` multiplies x (..., I) by 8-bit centroids in whole numbers."""
        return self.bits == 8 and self.n_centroids <= 256 and self.dtype == torch.float32 and takes_integers(x)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias for (..., I), where `multiplies` says so: (..., O)."""
        kept = self._turned
        if kept is None or kept[0] is not self.codes:  # a view takes as long as a small product
            self._turned = kept = self.codes, self.codes.t()
        if self.in_integers(x):
            return linear_of_centroids(x, kept[1], *self.centroids_in_bytes(), bias, getattr(x, GRID, None))
        rounded = self.stored_centroids()
        self._prepared = prepared = self._made_ready(rounded)
        found = None
        if prepared is not None:  # now already, or the next product would be another in the last digits
            found = prepared.linear(x, self._buffers[CODES], self._parameters[CENTROIDS], bias)
        return linear(x, kept[1], rounded, bias) if found is None else found

    def _made_ready(self, rounded: Tensor) -> Prepared | None:
        """What `product` needs of the weight as it is; None in a graph, and where another form multiplies."""
        codes, centroids, stored = self._buffers[CODES], self._parameters[CENTROIDS], self._stored
        if in_graph() or stored is None or codes is None or centroids is None:
            return None
        return Prepared.of(codes, centroids, stored[0], rounded)
