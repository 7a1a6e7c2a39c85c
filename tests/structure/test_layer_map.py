"""The arithmetic of layers in use and in store."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import refuses

from fairseq_quant_noise.structure.layer_map import chunk_map, kept_layers, parse_keep, side_of


@given(st.integers(1, 12), st.integers(1, 6))
def test_a_chunk_is_stored_by_its_first_layer(chunks, size):
    found = chunk_map("layers", chunks * size, size)
    assert found == [first for first in range(0, chunks * size, size) for _ in range(size)]


@pytest.mark.parametrize("chunk", [3, 0, -1, 16, True, 2.0])
def test_chunks_that_do_not_divide_the_layers_are_refused(chunk):
    with refuses(r"decoder\.layers: chunks of .* do not divide its 8 layers; give a share_layers of 1, 2, 4, 8"):
        chunk_map("decoder.layers", 8, chunk)


def test_every_other_keeps_the_first_of_each_pair():
    assert kept_layers("keep", "every-other", "layers", 7) == [0, 2, 4, 6]


def test_every_other_goes_by_chunks():
    assert kept_layers("keep", "every-other", "layers", 8, 2) == [0, 1, 4, 5]


@given(st.sets(st.integers(0, 9), min_size=1), st.integers(1, 4))
def test_whole_chunks_that_are_there_can_be_kept(chunks, size):
    layers = [i for chunk in chunks for i in range(chunk * size, chunk * size + size)]
    assert kept_layers("keep", parse_keep("keep", layers), "layers", 10 * size, size) == sorted(layers)


@pytest.mark.parametrize("given", ["2,0", " 0, 2 ", [2, 0], (0, 2)])
def test_lists_are_sorted(given):
    assert parse_keep("keep", given) == (0, 2)


@pytest.mark.parametrize("given", ["", [], "0,x", "0,,2", [-1], "-1", [0.5], [True], 3, None, "every"])
def test_what_is_no_list_of_layers_is_refused(given):
    with refuses("--keep is .*(name the layers|numbers of the layers) to keep, such as 0,2,4"):
        parse_keep("--keep", given)


def test_a_layer_named_twice_is_refused():
    with refuses("--keep names layer 2 twice; name each layer once"):
        parse_keep("--keep", "0,2,2")


def test_a_layer_that_is_not_there_is_refused():
    with refuses(r"--keep names layer 4, and decoder\.layers has 4 layers; give numbers from 0 to 3"):
        kept_layers("--keep", (0, 4), "decoder.layers", 4)


def test_a_part_of_a_chunk_is_refused():
    with refuses("keeps layer 2 of layers and not layer 3, which shares its weights; keep all of 2, 3, or none"):
        kept_layers("--keep", (0, 1, 2), "layers", 4, 2)


def test_the_last_chunk_of_a_stage_of_blocks_may_be_shorter():
    assert chunk_map("blocks.3.layers", 5, 2) == [0, 0, 2, 2, 4]
    assert kept_layers("--keep", (0, 1, 4), "blocks.3.layers", 5, 2) == [0, 1, 4]
    with refuses("keeps layer 2 of blocks.3.layers and not layer 3"):
        kept_layers("--keep", (2,), "blocks.3.layers", 5, 2)


@pytest.mark.parametrize(
    ("stack", "side"),
    [("encoder.sentence_encoder.layers", "encoder"), ("decoder.layers", "decoder"), ("blocks.3.layers", "blocks_3")],
)
def test_options_about_a_stack_begin_with_its_side(stack, side):
    assert side_of(stack) == side
