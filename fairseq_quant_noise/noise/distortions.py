"""The distortions phi: what happens to a block that the noise hits.

A distortion maps blocks (n, d) to distorted blocks (n, d); it neither chooses blocks nor knows about gradients.
To add one: write the function, name it in DISTORTIONS, test it in tests/noise/test_distortions.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Distortion = Callable[[Tensor], Tensor]


def proxy(blocks: Tensor) -> Tensor:
    """phi_proxy(b) = 0: the stand-in for product quantization (arXiv 2004.07320, section 4.2).

    Args:
        blocks: (n, d).
    Returns:
        (n, d), zeros; a broadcast view, not to be written to.
    """
    return torch.zeros((), dtype=blocks.dtype, device=blocks.device).expand_as(blocks)


#: By the name that a plan's `kind` gives.
DISTORTIONS: dict[str, Distortion] = {"proxy": proxy}
