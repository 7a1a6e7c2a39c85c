"""Reading a packed file that may come from anywhere: equal, or refused in one line with exit code 3."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_files import damaged, entry, forge, packed_zoo
from toys import refuses

from fairseq_quant_noise.artifact import manifest as manifest_module
from fairseq_quant_noise.artifact import pack, read, write
from fairseq_quant_noise.artifact.writer import serialize
from fairseq_quant_noise.errors import DamagedFileError, UserError
from fairseq_quant_noise.utils.bits import pack_bits


@pytest.fixture(scope="module")
def packed():
    return packed_zoo()


@pytest.fixture(scope="module")
def content(packed):
    return bytes(serialize(packed))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("files") / "model.safetensors"


def refused(place, content):
    place.write_bytes(content)
    with damaged() as caught:
        read(place)
    assert caught.value.exit_code == 3


# Whole files


def test_what_was_written_is_read(packed, tmp_path):
    write(packed, tmp_path / "a")
    found = read(str(tmp_path / "a"))
    assert found.manifest == packed.manifest
    assert found.tensors.keys() == packed.tensors.keys()
    for name, tensor in packed.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


@pytest.mark.upstream(8)
def test_ties_are_filled_in(packed, tmp_path):
    write(packed, tmp_path / "a")
    state = read(tmp_path / "a").state_dict()
    assert state["out.weight.codes"] is state["emb.weight.codes"]
    assert state["out.weight.centroids"] is state["emb.weight.centroids"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_other_tensors_keep_their_dtype_and_shape(dtype, tmp_path):
    model = torch.nn.Module()
    model.register_buffer("scalar", torch.ones((), dtype=dtype))
    model.register_buffer("empty", torch.ones(0, 3, dtype=dtype))
    write(pack(model), tmp_path / "a")
    found = read(tmp_path / "a").tensors
    assert (found["scalar"].dtype, found["scalar"].shape, found["empty"].shape) == (dtype, (), (0, 3))


# Damage


def test_a_file_cut_anywhere_is_refused(place, content):
    rng = random.Random(0)
    ends = [*range(10), *sorted(rng.sample(range(10, len(content)), 40)), len(content) - 1]
    for end in ends:
        refused(place, content[:end])


def test_a_single_flipped_bit_anywhere_is_refused(place, content):
    rng = random.Random(1)
    places = [*range(64), *rng.sample(range(64, 8 * len(content)), 100), 8 * len(content) - 1]
    for bit in places:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        refused(place, bytes(flipped))


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_bytes_replaced_inserted_or_removed_are_refused(place, content, data):
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(start + 16, len(content))))
    changed = content[:start] + data.draw(st.binary(max_size=16)) + content[end:]
    if changed != content:
        refused(place, changed)


@given(st.binary(max_size=200))
@settings(max_examples=40, deadline=None)
def test_any_other_bytes_are_refused(place, junk):
    refused(place, junk)


HEADERS = [b"", b"[]", b"{}", b"5", b"null", b"\xff\xfe", b"[" * 50_000, b'{"__metadata__":5}', b'{"__metadata__":{}}']
TEXTS = [b"", b"a line of text\n", b"PK\x03\x04" + bytes(100), bytes(1000), b"\xff" * 1000]


@pytest.mark.parametrize("header", HEADERS, ids=lambda h: repr(h[:24]))
def test_other_headers_are_refused(place, header):
    refused(place, len(header).to_bytes(8, "little") + header + bytes(64))


@pytest.mark.parametrize("text", TEXTS, ids=lambda t: repr(t[:8]))
def test_an_empty_file_and_other_kinds_of_file_are_refused(place, text):
    refused(place, text)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8 + 1, 100_000])
def test_a_header_that_is_longer_than_the_file_is_refused(place, content, length):
    place.write_bytes(length.to_bytes(8, "little") + content[8:])
    with damaged("its header is longer than the file"):
        read(place)


def test_a_safetensors_file_of_another_program_is_refused(place):
    from safetensors.torch import save

    place.write_bytes(save({"w": torch.ones(3)}, metadata={"format": "pt"}))
    with damaged(r"not a file of fairseq_quant_noise \(its header has no manifest\)"):
        read(place)


def test_a_missing_file_is_the_users_mistake_and_not_damage(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with refuses("give the path of a packed file", UserError) as caught:
            read(path)
        assert caught.value.exit_code == 2


# Hostile files, whose hash is right


def test_an_unknown_version_is_refused(packed, place, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(manifest_module, "_PLAIN", 8)
        write(packed, place)
    with damaged(r"format version 8 is unknown here \(this package reads 3 to 7\); update fairseq_quant_noise"):
        read(place)


def test_a_file_without_a_manifest_entry_is_refused(packed, place):
    forge(place, packed, lambda m: m.pop("ties"))
    with damaged("its manifest is damaged .*'ties'"):
        read(place)


THREES = torch.full((8, 2), 3, dtype=torch.uint8)
PARTS = r"its parts are not codes \(torch.uint8\), centroids \(torch.float16\)"
CODES, CENTROIDS = "fc.weight.codes", "fc.weight.centroids"
WRONG_TENSORS = {
    "codes for twice the blocks": ("codes' shape", {CODES: torch.zeros(8, dtype=torch.uint8)}),
    "a byte too many": ("codes' shape", {CODES: torch.zeros(5, dtype=torch.uint8)}),
    "a byte a code, as version 1 had them": ("codes' shape", {CODES: torch.zeros(8, 2, dtype=torch.uint8)}),
    "codes that are not bytes": (PARTS, {CODES: torch.zeros(4, dtype=torch.int64)}),
    "centroids of other blocks": ("centroids' shape", {CENTROIDS: torch.zeros(4, 8).half()}),
    "centroids in fp32": (PARTS, {CENTROIDS: torch.zeros(4, 4)}),
    "centroids to infinity": (
        "a centroid that is not finite",
        {CENTROIDS: torch.full((4, 4), float("inf")).half()},
    ),
    "scales that fp16 centroids have not": (PARTS, {"fc.weight.affine": torch.ones(2, 1)}),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_tensors_that_contradict_the_manifest_are_refused_by_name(packed, place, name):
    message, tensors = WRONG_TENSORS[name]
    forge(place, packed, **tensors)
    with damaged(rf"tensor fc\.weight: damaged \({message}"):
        read(place)


def test_a_code_beyond_its_centroids_is_refused(packed, place):
    """Two bits can say 3, and there are 3 centroids."""
    forge(place, packed, entry(n_centroids=3), **{CENTROIDS: torch.zeros(3, 4).half(), CODES: pack_bits(THREES, 2)})
    with damaged(r"tensor fc\.weight: damaged \(a code beyond its 3 centroids\)"):
        read(place)


WRONG_ENTRIES = {
    "codes of numbers": entry(scheme="int2", block_size=None, n_centroids=None),
    "centroids of 8 bits": entry(centroid_bits=8),
    "channels that pq has not": entry(channels=4),
    "another shape": entry(shape=[8, 16]),
    "a shape of one number": entry(shape=[16]),
    "an empty shape": entry(shape=[], block_size=1),
    "a huge shape": entry(shape=[10**30, 8]),
    "other blocks": entry(block_size=2),
    "blocks that do not tile": entry(block_size=3),
    "other centroids": entry(n_centroids=3),
    "a tensor that is not there": lambda m: m["tensors"].update({"nowhere": m["tensors"]["fc.weight"]}),
    "a name of two lines": lambda m: m["tensors"].update({"no\nwhere": m["tensors"]["fc.weight"]}),
    "a tie to nothing": lambda m: m["ties"].update({"x": "nowhere"}),
    "a tied copy of two lines": lambda m: m["ties"].update({"x\ny": "nowhere"}),
    "ties as a list": lambda m: m.update(ties=[]),
    "a plan that is a number": lambda m: m.update(plan=5),
}


@pytest.mark.parametrize("name", WRONG_ENTRIES)
def test_a_manifest_that_contradicts_the_tensors_is_refused(packed, place, name):
    forge(place, packed, WRONG_ENTRIES[name])
    with damaged():
        read(place)


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "C64", "X9", "F6_E2M3"])
def test_a_tensor_of_a_type_that_torch_may_lack_is_read_or_refused(packed, place, dtype):
    """The header is changed in place; the hash is made right."""
    import hashlib

    content = bytes(serialize(packed))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["scale"]["dtype"] = dtype
    text = json.dumps(header, separators=(",", ":")).encode()
    old = json.loads(header["__metadata__"]["fairseq_quant_noise"])["sha256"].encode()
    text = text.replace(old, b"0" * 64)
    forged = len(text).to_bytes(8, "little") + text + content[8 + length :]
    place.write_bytes(forged.replace(b"0" * 64, hashlib.sha256(forged).hexdigest().encode(), 1))
    message = ""
    try:
        read(place)
    except DamagedFileError as error:
        message = str(error)
    assert "\n" not in message
    assert "SHA-256" not in message  # the forgery itself is sound
