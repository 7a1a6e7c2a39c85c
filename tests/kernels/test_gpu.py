"""The Triton kernel against the reference: on a GPU, or by hand with TRITON_INTERPRET=1 where triton is installed."""

import importlib.util
import os

import pytest
import torch

from fairseq_quant_noise import kernels
from fairseq_quant_noise.kernels import gpu, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize(("rows", "blocks", "d", "k"), [(70, 5, 4, 16), (256, 64, 8, 256), (33, 40, 3, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_product_with_codes_is_that_of_the_reference(n, rows, blocks, d, k, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, blocks * d, generator=generator).to(DEVICE, dtype)
    centroids = torch.randn(k, d, generator=generator).to(DEVICE, dtype)
    codes = torch.randint(k, (blocks, rows), generator=generator, dtype=torch.uint8).to(DEVICE)
    bias = torch.randn(rows, generator=generator).to(DEVICE, dtype)
    expected = reference.linear(x.double(), codes, centroids.double(), bias.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-3
    scale = float(expected.abs().max())
    torch.testing.assert_close(gpu.linear(x, codes, centroids, bias).double(), expected, rtol=0, atol=tolerance * scale)
    assert gpu.linear(x.view(1, n, -1), codes, centroids).shape == (1, n, rows)


@needs_gpu
def test_a_code_beyond_the_centroids_reads_zeros_and_no_memory():
    codes = torch.full((4, 5), 255, dtype=torch.uint8, device=DEVICE)
    x = torch.ones(1, 16, device=DEVICE)
    assert not gpu.linear(x, codes, torch.ones(4, 4, device=DEVICE)).any()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_few_rows_on_a_gpu_are_multiplied_by_codes():
    x, centroids = torch.ones(8, 64, device="cuda").half(), torch.ones(16, 4, device="cuda").half()
    assert kernels.takes_linear(x, centroids)
    assert not kernels.takes_linear(x.repeat(2, 1), centroids)
    codes = torch.zeros(16, 30, dtype=torch.uint8, device="cuda")
    assert torch.equal(kernels.linear(x, codes, centroids), torch.full((8, 30), 64.0, device="cuda").half())
