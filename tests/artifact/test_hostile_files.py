"""Files that somebody made or a disk broke: mutations of whole ones, and what they may ask of the machine."""

import os
import random

import pytest
import torch
from fuzzing import outcome, sources
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import BLIND, FORGED, Parts, mutate
from packed_files import damaged, forge, packed_zoo
from toys import refuses, zoo

from fairseq_quant_noise import load, save
from fairseq_quant_noise.artifact import pack, read, write
from fairseq_quant_noise.artifact.configuration import check_configuration
from fairseq_quant_noise.errors import DamagedFileError, UserError
from fairseq_quant_noise.utils.bits import largest_code, pack_bits

MUTATIONS = {mutation.__name__: mutation for mutation in (*BLIND, *FORGED)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("files") / "model.safetensors"


@given(st.integers(0, 2**64))
@settings(max_examples=60, deadline=None)
def test_any_mutation_is_refused_in_a_line_or_is_a_file(place, seed):
    """At full count: python tests/scripts/fuzz_packed.py"""
    rng = random.Random(seed)
    source = sources()[rng.choice([name for name, source in sources().items() if source.task is None])]
    _, forged, content = mutate(source.content, rng)
    outcome(source, content, forged, place)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_of_each_kind_is_refused_in_a_line_or_is_a_file(place, name):
    for seed, source in enumerate(("zoo in pq", "zoo in int8 centroids", "roberta")):
        content = MUTATIONS[name](sources()[source].content, random.Random(seed))
        outcome(sources()[source], content, MUTATIONS[name] in FORGED, place)


def test_every_file_that_is_mutated_is_a_file(place):
    for source in sources().values():
        place.write_bytes(Parts.of(source.content).join())
        load(place, into=source.network() if source.network else None)
        assert outcome(source, source.content, False, place) == "the original"


def test_what_was_checked_stays_when_the_file_is_written_over(place):
    save(zoo(), place)
    tensors = read(place).tensors
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with open(place, "r+b") as file:
        file.write(bytes(os.path.getsize(place)))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())


def test_a_device_or_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe"):
        with refuses("is a device or a pipe; copy it to a file first", UserError):
            read(path)


def test_a_link_in_the_place_of_the_output_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "out").symlink_to(tmp_path / "precious")
    write(packed_zoo(), tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "out").is_symlink()
    assert read(tmp_path / "out").tensors


@pytest.mark.parametrize("n", [1, 7, 100])
@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
def test_the_largest_code_is_found_without_unpacking(n, bits):
    codes = torch.randint(2**bits, (n,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert largest_code(pack_bits(codes, bits), n, bits) == int(codes.max())


# Names


FORMS = {
    "dense as well": {"fc.weight": torch.ones(8, 8)},
    "with a part that it has not": {"fc.weight.scalar": torch.tensor([8, 0], dtype=torch.uint8)},
    "quantized and not listed": {"x.codes": torch.ones(1, dtype=torch.uint8), "x.centroids": torch.ones(1, 1)},
    "in N bits and not listed": {"x.affine": torch.ones(2, 1), "x.scalar": torch.ones(2, dtype=torch.uint8)},
}


@pytest.mark.parametrize("name", FORMS)
def test_a_tensor_in_two_forms_is_refused(place, name):
    forge(place, packed_zoo(), **FORMS[name])
    with damaged("is in the file in two forms, or is not listed in its manifest"):
        read(place)


def test_a_tied_copy_that_looks_like_a_part_is_refused(place):
    for copy in ("fc.weight.scalar", "out.weight.affine", "fc.weight.codes.x"):
        forge(place, packed_zoo(), lambda m, copy=copy: m["ties"].update({copy: "scale"}))
        if copy.endswith(".x"):
            assert read(place).ties[copy] == "scale"
            continue
        with damaged(rf"tensor {copy}: is in the file in two forms"):
            read(place)


def test_a_name_that_would_steer_the_terminal_is_refused_and_not_printed(place):
    forge(place, packed_zoo(), **{"\x1b[2J": torch.ones(1)})
    with damaged("a name that is not plain text"):
        read(place)
    assert str(UserError("a\x1b[2Jb\u202ec\ud800d")) == "a?[2Jb?c?d"


def test_a_tie_onto_what_is_stored_is_refused(place):
    forge(place, packed_zoo(), lambda m: m["ties"].update({"fc.bias": "norm.bias"}))
    with damaged(r"tensor fc\.bias: is in the file, and tied to 'norm\.bias' as well"):
        read(place)


def test_ties_without_number_are_refused(place):
    forge(place, packed_zoo(), lambda m: m.update(layers={"layers": [0] * 100_000}))
    with damaged("ties and layers in use stand for .* tensors"):
        read(place)


# Sizes


def test_few_bytes_that_stand_for_terabytes_are_refused(place):
    bomb = {"bomb.codes": torch.zeros(10_000, dtype=torch.uint8), "bomb.centroids": torch.zeros(1, 100_000).half()}
    entry = {"scheme": "pq", "shape": [80_000, 100_000], "block_size": 100_000, "n_centroids": 1}
    forge(place, packed_zoo(), lambda m: m["tensors"].update(bomb=entry), **bomb)
    with damaged(r"its tensors stand for 32,000,.* bytes, which no file of .* bytes does"):
        read(place)


def test_a_header_of_megabytes_is_refused_before_it_is_parsed(place):
    header = b'{"__metadata__":{}' + b" " * (2 << 20) + b"}"
    place.write_bytes(len(header).to_bytes(8, "little") + header)
    with damaged("a header of 2,097,.* bytes"):
        read(place)


def test_what_could_not_be_read_is_not_written(tmp_path):
    with refuses("this network cannot be a packed file: .*option decoder_layers: 1000000 is implausibly large"):
        write(pack(zoo(), config={"cfg": {"model": {"decoder_layers": 10**6}}}), tmp_path / "out")
    many = torch.nn.Module()
    for i in range(1200):
        many.register_buffer(f"{'a' * 1000}{i}", torch.ones(1))
    with refuses("this network cannot be a packed file: the names of its 1,200 tensors take"):
        save(many, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# Configuration

HOSTILE = {
    "a resolver": {"data": "${oc.env:HOME}"},
    "a reference to a reference": {"data": "${model.arch}", "arch": "${model.data}"},
    "code where fairseq evaluates": {"adaptive_softmax_cutoff": "__import__('os').system('true')"},
    "code in a list": {"adaptive_input_cutoff": ["f()"]},
    "layers without end": {"decoder_layers": 10**9},
    "positions without end": {"max_target_positions": 10**9},
    "a number without end": {"decoder_embed_dim": 10**30},
    "a list without end": {"x": [1] * 5000},
    "a section of numbers": 5,
    "depth": {"x": [[[[[[[[]]]]]]]]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_configuration_that_no_network_has_is_refused(name):
    with refuses("its configuration is damaged", DamagedFileError):
        check_configuration({"architecture": "x", "cfg": {"model": HOSTILE[name]}})


def test_a_configuration_of_values_and_references_to_them_is_taken():
    sections = {"model": {"a": "${common.tpu}", "adaptive_softmax_cutoff": "20,60"}, "common": {"tpu": False}}
    check_configuration({"architecture": "x", "cfg": sections, "vocab_size": 10})
    check_configuration({})
