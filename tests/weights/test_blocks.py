"""How weights are cut into blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import refuses

from fairseq_quant_noise.weights.blocks import as_blocks, check_block_size, code_shape, divides, fitting_block_size

CASES = [
    (nn.Linear(12, 5), {1, 2, 3, 4, 6, 12}),
    (nn.Embedding(5, 8), {1, 2, 4, 8}),
    (nn.Conv2d(6, 5, 1), {1, 2, 3, 6}),
    (nn.Conv2d(12, 6, 1, groups=2), {1, 2, 3, 6}),
    (nn.Conv2d(4, 5, 3), {1, 3, 9, 18, 36}),
    (nn.Conv2d(4, 4, 3, groups=4), {1, 3, 9}),
    (nn.Conv2d(4, 4, 5, groups=4), {1, 5, 25}),
    (nn.Conv2d(2, 5, (1, 3)), {1, 3, 6}),
    (nn.Conv1d(4, 5, 3), {1, 3, 6, 12}),
    (nn.Conv3d(2, 5, 2), {1, 2, 4, 8, 16}),
    (nn.Bilinear(2, 3, 5), {1, 3, 6}),
]


@pytest.mark.upstream(18)
@pytest.mark.parametrize(("module", "fits"), CASES, ids=lambda x: str(x))
def test_the_block_sizes_that_fit(module, fits):
    assert {d for d in range(1, 50) if divides(module.weight.shape, d)} == fits


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_a_block_lies_in_one_row_and_in_one_kernel_or_is_whole_kernels(out, channels, height, width, d):
    conv = nn.Conv2d(channels, out, (height, width), device="meta")
    kernel = height * width
    if divides(conv.weight.shape, d):
        assert channels * kernel % d == 0
        assert kernel == 1 or kernel % d == 0 or d % kernel == 0


def test_a_size_that_fits_passes():
    check_block_size("fc", (3, 8), 4)


@pytest.mark.parametrize("d", [0, -4, 5, 16])
def test_a_size_that_does_not_is_refused_with_the_tensor_its_shape_and_what_fits(d):
    with refuses(rf"^decoder\.fc1: blocks of {d} do not divide .* \(3, 8\); choose a block_size of 1, 2, 4, 8 for it"):
        check_block_size("decoder.fc1", (3, 8), d)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((5, 6), 3), ((5, 6, 1, 1), 3), ((5, 6, 3, 3), 9), ((5, 6, 5, 5), 5), ((5, 6, 10), 5), ((5, 1, 31), 31)],
)
def test_one_number_for_a_network_of_convolutions_becomes_a_size_that_fits(shape, size):
    assert fitting_block_size(shape, 4) == size
    assert divides(shape, size)


def test_blocks_are_runs_of_the_row_major_weight_without_a_copy():
    weight = torch.arange(24.0).view(3, 8)
    blocks = as_blocks(weight, 4)
    assert blocks.tolist()[:3] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert blocks.data_ptr() == weight.data_ptr()


def test_a_block_of_a_convolution_is_a_kernel():
    conv = nn.Conv2d(2, 3, 3)
    assert torch.equal(as_blocks(conv.weight, 9)[3], conv.weight[1, 1].flatten())


@pytest.mark.parametrize(("shape", "d", "codes"), [((5, 8), 4, (5, 2)), ((6, 4, 3, 3), 9, (6, 4)), ((7,), 1, (7, 1))])
def test_the_code_matrix_has_a_row_for_each_row(shape, d, codes):
    assert code_shape(shape, d) == codes
