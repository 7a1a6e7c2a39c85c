"""Rounding a tensor to fp16 where every value survives."""

import pytest
import torch

from fairseq_quant_noise.utils.halves import halved

NORMAL = torch.linspace(-3, 3, 301)
SURVIVING = {
    "ordinary numbers": NORMAL,
    "some that are nearly zero": torch.cat([NORMAL, torch.tensor([1e-7, -3e-10, 0.0])]),
    "the largest": torch.tensor([65504.0, -65519.0, 2.0]),
    "zeros": torch.zeros(5),
    "one number": torch.tensor(3.0),
    "a matrix": NORMAL.view(7, 43),
}
LOST = {
    "too large": torch.tensor([65520.0, 1.0]),
    "all of them nearly zero": torch.full((4,), 3e-6),
    "infinity": torch.tensor([1.0, float("inf")]),
    "NaN": torch.tensor([1.0, float("nan")]),
    "nothing": torch.empty(0),
    "whole numbers": torch.arange(3),
    "double": NORMAL.double(),
    "bfloat16": NORMAL.bfloat16(),
}


@pytest.mark.parametrize("tensor", SURVIVING.values(), ids=SURVIVING)
def test_numbers_that_survive_are_rounded(tensor):
    found = halved("norm.bias", tensor)
    assert (found.dtype, found.shape) == (torch.float16, tensor.shape)
    torch.testing.assert_close(found.float(), tensor, rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize("tensor", LOST.values(), ids=LOST)
def test_a_tensor_with_a_number_that_would_not_stays_as_it_is(tensor):
    assert halved("norm.bias", tensor) is tensor


@pytest.mark.parametrize("value", [2e-5, 1e-8])
def test_each_variance_counts_by_itself(value):
    """A network divides by their roots: one that became 0 would not be lost beside the others."""
    tensor = torch.cat([torch.rand(50) + 0.5, torch.tensor([value])])
    assert halved("norm.running_mean", tensor).dtype == torch.float16
    assert halved("norm.running_var", tensor) is tensor
    assert halved("running_var", tensor[:-1]).dtype == torch.float16


def test_what_was_rounded_once_stays_as_it_is():
    once = halved("bias", torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(halved("bias", once.float()), once)


def test_buffers_whose_use_nobody_knows_have_to_be_exact():
    counts, frequencies = torch.tensor([4099.0]), 10000 ** -(torch.arange(8) / 8)
    assert halved("count", counts, is_buffer=True) is counts
    assert halved("rope.inv_freq", frequencies, is_buffer=True) is frequencies
    assert halved("mask", torch.ones(3), is_buffer=True).dtype == torch.float16
    assert halved("norm.running_mean", frequencies, is_buffer=True).dtype == torch.float16
