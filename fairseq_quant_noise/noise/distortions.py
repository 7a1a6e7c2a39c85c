"""The distortions phi: what happens to a block that the noise hits.

    proxy        phi(b) = 0                                 the stand-in for product quantization
    mean         phi(b) = mean of b's numbers
    pq           phi(b) = the nearest centroid of the weight's codebook
    int2 .. int8 phi(w) = (clamp(round(w/s) + z) - z) * s   number by number
    a list       one after the other: [pq, int8] is a centroid in 8 bits

(arXiv 2004.07320, section 4.2.) A distortion is made for one weight; it neither chooses blocks nor handles gradients.
In `fit`, at the rule's interval, it measures what it needs of the weight (a codebook, a range).
To add one: write the class, name it in DISTORTIONS, test it in tests/noise/test_distortions.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..plan.rules import NoiseRule
from ..pq.encode import nearest
from ..pq.kmeans import effective_centroids, kmeans
from ..scalar import BITS, SCHEMES, Affine, fake_quantize, fit_affine

FIRST_ITERATIONS, NEXT_ITERATIONS = 20, 5  # k-means iterations: a first codebook, a later one


class Distortion:
    """phi for the blocks of one weight."""

    def fit(self, blocks: Tensor) -> None:
        """Measure on the (n, d) blocks what the distortion needs; by default nothing."""

    def __call__(self, blocks: Tensor, hit: Tensor | None) -> Tensor:
        """phi(b) for the blocks that are hit; the other rows may hold anything.

        Args:
            blocks: (n, d), not to be written to.
            hit: (n,) bool, or None where all are hit.

        Returns:
            (n, d), of the same dtype.

        Raises:
            NotImplementedError: the distortion does not override it.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """What `fit` measured: tensors by name, of shapes that each subclass states (by default none)."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave (by default nothing)."""


class Proxy(Distortion):
    """phi(b) = 0: the stand-in for product quantization."""

    def __call__(self, blocks: Tensor, hit: Tensor | None) -> Tensor:
        """Zeros (n, d); a broadcast view."""
        return torch.zeros((), dtype=blocks.dtype, device=blocks.device).expand_as(blocks)


class Mean(Distortion):
    """phi(b) = the mean of b's numbers, d times."""

    def __call__(self, blocks: Tensor, hit: Tensor | None) -> Tensor:
        """(n, d); the mean is taken in float32; a broadcast view."""
        return blocks.mean(1, keepdim=True, dtype=torch.float32).to(blocks.dtype).expand_as(blocks)


class Codebook(Distortion):
    """phi(b) = the centroid nearest to b now, of a codebook found at the last `fit`: the exact phi_PQ."""

    def __init__(self, name: str, rule: NoiseRule, rows: int) -> None:
        self.name, self.n_centroids = name, rule.n_centroids
        self.centroids: Tensor | None = None  # (K, d) float32
        self.codes: Tensor | None = None  # (n,) uint8, int32 for K above 256: each block's centroid at the last fit

    def fit(self, blocks: Tensor) -> None:
        """Run k-means over all blocks, (n, d), from the last centroids where there are some.

        Raises:
            UserError: the blocks hold NaN or infinity.
        """
        if not bool(blocks.isfinite().all()):
            raise _diverged(self.name)
        k = effective_centroids(len(blocks), self.n_centroids)
        iterations = FIRST_ITERATIONS if self.centroids is None else NEXT_ITERATIONS
        found = kmeans(blocks, k, iterations=iterations, start=self.centroids)
        self.centroids, self.codes = found.centroids, found.codes

    def __call__(self, blocks: Tensor, hit: Tensor | None) -> Tensor:
        """The nearest centroids, (n, d); only those of the blocks that are hit are looked for.

        Raises:
            UserError: a block that is hit holds NaN or infinity.
        """
        if hit is None:
            return self._nearest(blocks)
        rows = hit.nonzero()[:, 0]
        return blocks.index_copy(0, rows, self._nearest(blocks.index_select(0, rows)))

    def to(self, device: torch.device) -> None:
        """Move what was measured to where the weight is: a checkpoint brings it to the CPU."""
        if self.centroids is not None and self.codes is not None and self.codes.device != device:
            self.centroids, self.codes = self.centroids.to(device), self.codes.to(device)

    def _nearest(self, blocks: Tensor) -> Tensor:
        self.to(blocks.device)
        centroids = self.centroids
        assert centroids is not None
        if not bool(blocks.isfinite().all()):
            raise _diverged(self.name)
        return centroids.index_select(0, nearest(blocks, centroids)).to(blocks.dtype)

    def state(self) -> dict[str, Tensor]:
        """`centroids` (K, d) float32 and `codes` (n,); nothing before the first `fit`."""
        return (
            {} if self.centroids is None or self.codes is None else {"centroids": self.centroids, "codes": self.codes}
        )

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back `centroids` (K, d) and `codes` (n,)."""
        self.centroids, self.codes = state.get("centroids"), state.get("codes")


def _diverged(name: str) -> UserError:
    return UserError(f"{name}: the weight holds NaN or infinity; go on from a checkpoint from before it diverged")


class Scalar(Distortion):
    """phi_intN, on the weight's range at the last `fit`."""

    def __init__(self, name: str, rule: NoiseRule, rows: int, bits: int) -> None:
        self.name, self.range, self.rows, self.bits = name, rule.range, rows, bits
        self.interval = rule.interval
        self.affine: Affine | None = None

    def fit(self, blocks: Tensor) -> None:
        """Find the range of the weight, whose blocks are (n, d) and whose rows are its output channels.

        Raises:
            UserError: the blocks hold NaN or infinity; not checked on a GPU where the rule's interval is 1.
        """
        often = self.interval == 1 and blocks.is_cuda
        self.affine = fit_affine(self.name, blocks.reshape(self.rows, -1), self.bits, self.range, check=not often)

    def __call__(self, blocks: Tensor, hit: Tensor | None) -> Tensor:
        """(n, d), every number rounded to its code."""
        assert self.affine is not None
        self.affine = self.affine.to(blocks.device)  # a checkpoint brings it to the CPU
        return fake_quantize(blocks.reshape(self.rows, -1), self.affine).view_as(blocks)

    def state(self) -> dict[str, Tensor]:
        """`scale` float32 and `zero_point` int32, each (1,) or (C,); nothing before the first `fit`."""
        return {} if self.affine is None else {"scale": self.affine.scale, "zero_point": self.affine.zero_point}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back `scale` and `zero_point`, each (1,) or (C,)."""
        self.affine = Affine(state["scale"], state["zero_point"], self.bits) if state else None


class Composed(Distortion):
    """Several distortions, one after the other, each fitted on what the ones before make of the weight."""

    def __init__(self, parts: Sequence[Distortion]) -> None:
        self.parts = parts

    def fit(self, blocks: Tensor) -> None:
        """Fit the parts in turn, each on the (n, d) blocks as the parts before distort them.

        Raises:
            UserError: as the parts' `fit`.
        """
        for i, part in enumerate(self.parts):
            part.fit(blocks)
            if i + 1 < len(self.parts):
                blocks = part(blocks, None)

    def __call__(self, blocks: Tensor, hit: Tensor | None) -> Tensor:
        """The last part's output, (n, d)."""
        for part in self.parts:
            blocks = part(blocks, hit)
        return blocks

    def state(self) -> dict[str, Tensor]:
        """The parts' states, of the parts' shapes, each name preceded by the part's number (`0.centroids`)."""
        return {f"{i}.{key}": value for i, part in enumerate(self.parts) for key, value in part.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Give each part its state back, under the names that `state` gives (`0.centroids`)."""
        for i, part in enumerate(self.parts):
            part.load_state({k.partition(".")[2]: v for k, v in state.items() if k.startswith(f"{i}.")})


Factory = Callable[[str, NoiseRule, int], Distortion]


def _scalar(bits: int) -> Factory:
    return lambda name, rule, rows: Scalar(name, rule, rows, bits)


#: By the name that a plan's `kind` gives: (the weight's name, the rule, the weight's rows) -> the distortion.
DISTORTIONS: dict[str, Any] = {
    "proxy": lambda name, rule, rows: Proxy(),
    "mean": lambda name, rule, rows: Mean(),
    "pq": Codebook,
    **{kind: _scalar(bits) for kind, bits in zip(SCHEMES, BITS, strict=True)},
}


def make_distortion(name: str, rule: NoiseRule, rows: int) -> Distortion:
    """phi of `rule` for the weight `name` of `rows` rows."""
    parts = [DISTORTIONS[kind](name, rule, rows) for kind in rule.kinds]
    return parts[0] if len(parts) == 1 else Composed(parts)
