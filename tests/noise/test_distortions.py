"""phi: what happens to a block that the noise hits."""

import pytest
import torch

from fairseq_quant_noise.noise import DISTORTIONS


@pytest.mark.parametrize("name", list(DISTORTIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_distortion_keeps_shape_and_dtype_and_leaves_its_input_alone(name, dtype):
    blocks = torch.randn(6, 4).to(dtype)
    before = blocks.clone()
    distorted = DISTORTIONS[name](blocks)
    assert distorted.shape == blocks.shape
    assert distorted.dtype == dtype
    assert torch.equal(blocks, before)


def test_proxy_is_zero_without_memory():
    distorted = DISTORTIONS["proxy"](torch.randn(1000, 8))
    assert not distorted.any()
    assert distorted.untyped_storage().nbytes() == 4
