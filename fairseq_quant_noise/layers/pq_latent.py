"""Codes that train: a product-quantized weight that is encoded again while a dense, latent weight trains beside it.

    forward     W_hat[block i] = centroids[codes[i]]                      what every user of the weight sees
    backward    dL/d latent := dL/d W_hat                                 straight-through (arXiv 1308.3432)
    encoding    codes[i] = argmin_k || latent[block i] - centroids[k] ||^2     after an update

as in PV-tuning (arXiv 2405.14852), with the centroids trained by their own gradient as in `pq.py`. The latent weight
is an ordinary Parameter, so that it lives in the user's own optimizer. It trains at `factor` times the optimizer's
learning rate: the Parameter holds latent / factor, and takes the latent weight's gradient as its own.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..pq.encode import nearest
from ..weights.blocks import as_blocks
from .parts import CENTROIDS, CODES, DISTANCES, LATENT_FACTOR, LATENT_WEIGHT
from .pq import PQWeight
from .registry import register


@register("pq latent")
class LatentPQWeight(PQWeight):
    """A `PQWeight` whose codes are found anew, by `encode_again`, as its latent weight moves.

    A checkpoint also holds the latent weight, its factor and, with a `share` below 1, the distances; a file does not.
    """

    plan_schemes = file_schemes = ()  # a stage and a file are PQWeight's; `codes: train` makes these of its weights
    entries = (*PQWeight.entries, LATENT_WEIGHT, LATENT_FACTOR, DISTANCES)
    needs = (CODES, CENTROIDS, LATENT_WEIGHT)
    full_precision = (*PQWeight.full_precision, LATENT_FACTOR, DISTANCES)

    latent_weight: nn.Parameter  # (rows, …), the latent weight over `factor`
    latent_factor: Tensor  # ()
    distances: Tensor | None  # (n,), squared
    factor: float  # `latent_factor` as a number

    def set_latent(self, latent: Tensor, factor: float, share: float = 1.0) -> None:
        """Let a dense weight, (rows, …), train at `factor` times the optimizer's learning rate.

        With a `share` of the blocks below 1, remember how far each is from its centroid: `encode_again` chooses by it.
        """
        rounded = torch.tensor(factor)  # float32, as a checkpoint will hold it
        self.factor = float(rounded)
        self.latent_weight = nn.Parameter((latent.detach() / self.factor).contiguous())  # a turned one is a view
        self.register_buffer(LATENT_FACTOR, rounded.to(latent.device))
        self.register_buffer(DISTANCES, None if share >= 1 else self._distances(self.blocks(), self._centroids()))

    def at_centroids(self) -> Tensor:
        """A latent weight, (rows, …), whose encoding finds the codes that are there."""
        return self._rounded().detach()[self.codes.flatten().long()].view(self.shape)

    def blocks(self) -> Tensor:
        """The blocks of the latent weight: (n, d) float32."""
        return as_blocks(self.latent_weight.detach().float() * self.factor, self.block_size)

    def error(self) -> Tensor:
        """(|| W_hat - latent ||^2, || latent ||^2): (2,), by the centroids as the file holds them."""
        blocks = self.blocks()
        return torch.stack([self._distances(blocks, self._centroids()).sum(), blocks.square().sum()])

    @torch.no_grad()
    def encode_again(self, share: float = 1.0) -> Tensor:
        """Find the nearest centroid of the blocks anew.

        Args:
            share: of the blocks; below 1 those whose squared distance to their centroid grew most since they were last
                encoded.

        Returns:
            How many codes changed, ().
        """
        blocks, centroids = self.blocks(), self._centroids()
        before = self.codes.flatten()  # (n,)
        if share >= 1:
            found = nearest(blocks, centroids).to(before.dtype)
        else:
            distances = self._distances(blocks, centroids)
            if self.distances is None:
                self.distances = distances
            most = (distances - self.distances).topk(max(1, round(share * len(blocks)))).indices
            some = blocks[most]
            new = nearest(some, centroids)
            found = before.clone()
            found[most] = new.to(before.dtype)
            self.distances[most] = (some - centroids[new]).square().sum(1)
        changed = (found != before).sum()  # now, for `before` may be a view of the codes
        self.codes.copy_(found.view(self.codes.shape))
        return changed

    def _centroids(self) -> Tensor:
        """The centroids (K, d) as the file holds them, in float32."""
        return self._rounded().detach().float()

    def _distances(self, blocks: Tensor, centroids: Tensor) -> Tensor:
        """Squared distances of (n, d) blocks to those of the centroids (K, d) that their codes name: (n,)."""
        return (blocks - centroids.index_select(0, self.codes.flatten().long())).square().sum(1)

    def prepare(self, parts: Mapping[str, Tensor]) -> None:
        """Make room for the latent weight of a state, (rows, …), and for its distances, (n,), if it has any."""
        self.set_latent(torch.empty_like(parts[LATENT_WEIGHT], dtype=self.dtype, device=self.device), 1.0)
        if DISTANCES in parts:
            self.distances = torch.empty_like(parts[DISTANCES], device=self.device)

    def takes(self, parts: Mapping[str, Tensor]) -> bool:
        """Whether it has a place for each of the `parts` of a state, such as codes (rows, blocks a row)."""
        return super().takes(parts) and (DISTANCES in parts) == (self.distances is not None)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: object, strict: bool, *lists: list[str]
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        if self.latent_factor.device.type != "meta":
            self.factor = float(self.latent_factor)
