"""Codes of N bits, packed without gaps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_quant_noise.utils import bits as bits_module
from fairseq_quant_noise.utils.bits import code_bits, code_dtype, largest_code, pack_bits, packed_size, unpack_bits


def codes_of(n, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, (n,), dtype=code_dtype(2**bits), generator=generator)


def by_hand(codes, bits):
    """The stream as one long number: code i in the bits from i * N up."""
    number = sum(code << i * bits for i, code in enumerate(codes.tolist()))
    return list(number.to_bytes(-(-len(codes) * bits // 8), "little"))


@given(n=st.integers(1, 70), bits=st.integers(1, 12), seed=st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_codes_lie_as_documented_and_come_back(n, bits, seed):
    codes = codes_of(n, bits, seed)
    packed = pack_bits(codes, bits)
    assert packed.tolist() == by_hand(codes, bits)
    assert len(packed) == packed_size(n, bits)
    found = unpack_bits(packed, n, bits)
    assert torch.equal(found, codes)
    assert found.dtype == codes.dtype
    assert largest_code(packed, n, bits) == codes.max()


def test_codes_of_four_bits_stand_two_a_byte_the_lower_first():
    codes = torch.tensor([[0x1, 0x2], [0x3, 0xF], [0xA, 0]], dtype=torch.uint8)
    assert pack_bits(codes, 4).tolist() == [0x21, 0xF3, 0x0A]


def test_the_last_byte_is_filled_up_with_zeros():
    assert pack_bits(torch.full((3,), 7, dtype=torch.uint8), 3).tolist() == [0b11111111, 0b1]


@pytest.mark.parametrize("bits", range(1, 13))
@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 32, 33, 48])
def test_a_chunk_ends_where_the_next_begins(bits, n, monkeypatch):
    codes = codes_of(n, bits)
    whole = pack_bits(codes, bits)
    monkeypatch.setattr(bits_module, "_CHUNK", 16)
    assert torch.equal(pack_bits(codes, bits), whole)
    assert torch.equal(unpack_bits(whole, n, bits), codes)


def test_a_chunk_ends_at_a_bytes_end():
    assert bits_module._CHUNK % 8 == 0


@pytest.mark.parametrize(
    ("k", "bits"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (128, 7), (129, 8), (256, 8), (257, 9), (4096, 12)]
)
def test_a_code_of_k_centroids_takes_the_bits_that_tell_them_apart(k, bits):
    assert code_bits(k) == bits


def test_packing_leaves_the_codes_as_they_were():
    codes = codes_of(9, 5)
    before = codes.clone()
    pack_bits(codes, 5)
    assert torch.equal(codes, before)
