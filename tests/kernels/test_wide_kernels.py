"""Codes of 9 to 12 bits in the compiled kernels: what no sound weight holds reads no memory."""

import pytest
import torch

from fairseq_quant_noise.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="there is no compiler here")


@pytest.mark.parametrize("code", [300, 4095, -1, -(2**31), 2**31 - 1])
def test_a_wide_code_beyond_the_centroids_reads_zeros_and_no_memory(code):
    """The lowest 12 bits of a code count; a code of another type is taken for one of its own."""
    codes, many, few = torch.full((3, 2), code, dtype=torch.int32), torch.ones(4000, 8), torch.ones(4, 8)
    inside = code % 4096 < 4000
    assert torch.equal(cpu.decode(codes, many), torch.full((3, 16), float(inside)))
    assert cpu.linear(torch.ones(1, 16), codes.t().contiguous(), many)[0].tolist() == [16.0 * inside] * 3
    cpu.linear(torch.ones(1, 16), codes.t().contiguous(), few)  # of a byte
    cpu.decode(codes, few)
