"""Hostile files with N-bit codes, int8 centroids and ranges of inputs: refused by name, with exit code 3."""

import pytest
import torch
from packed_files import damaged, entry, forge, packed_zoo

from fairseq_quant_noise.artifact import read

NAN, INF = float("nan"), float("inf")
AFFINE = "fc.weight.affine"


@pytest.fixture
def place(tmp_path):
    return tmp_path / "model.safetensors"


def refused(place, message="", kind=r"tensor fc\.weight: damaged \("):
    with damaged(kind + message) as caught:
        read(place)
    assert caught.value.exit_code == 3


def affine(scale=1.0, zero_point=0.0, channels=1):
    return torch.tensor([[scale], [zero_point]]).repeat(1, channels)


SCALES = {f"a scale of {s}": affine(scale=s) for s in (0.0, -0.0, -1.0, NAN, INF, -INF)}
ZERO_POINTS = {f"a zero point of {z}": affine(zero_point=z) for z in (-1.0, 0.5, 256.0, NAN, INF)}
SHAPES = {
    "a scale too many": affine(channels=2),
    "a scale for each channel": affine(channels=8),
    "scales alone": torch.ones(1, 1),
    "a vector": torch.ones(2),
    "nothing": torch.ones(2, 0),
}


@pytest.mark.parametrize("plan", ["int8", "int8 centroids"])
@pytest.mark.parametrize("name", SCALES | ZERO_POINTS | SHAPES)
def test_scales_and_zero_points_that_no_version_writes_are_refused(place, plan, name):
    forge(place, packed_zoo(plan=plan), **{AFFINE: (SCALES | ZERO_POINTS | SHAPES)[name]})
    refused(place, "scales or zero points")


def test_a_zero_point_beyond_the_bits_is_refused(place):
    forge(place, packed_zoo(plan="int4 by channel"), **{AFFINE: affine(zero_point=16.0, channels=8)})
    refused(place, "scales or zero points")


def test_one_bad_scale_among_the_channels_is_refused(place):
    scales = affine(channels=8)
    scales[0, 5] = NAN
    forge(place, packed_zoo(plan="int4 by channel"), **{AFFINE: scales})
    refused(place, "scales or zero points")


PARTS = "its parts are not codes .*affine"
WRONG_TENSORS = {
    "a byte too few": ("int8", "codes' shape", {"fc.weight.codes": torch.zeros(63, dtype=torch.uint8)}),
    "a nibble a byte": ("int4 by channel", "codes' shape", {"fc.weight.codes": torch.zeros(64, dtype=torch.uint8)}),
    "codes in the weight's shape": ("int8", "codes' shape", {"fc.weight.codes": torch.zeros(8, 8, dtype=torch.uint8)}),
    "signed codes": ("int8", PARTS, {"fc.weight.codes": torch.zeros(64, dtype=torch.int8)}),
    "scales in fp64": ("int8", PARTS, {AFFINE: affine().double()}),
    "scales in fp16": ("int8", PARTS, {AFFINE: affine().half()}),
    "centroids that codes of numbers have not": ("int8", PARTS, {"fc.weight.centroids": torch.zeros(4, 4).half()}),
    "fp16 centroids": ("int8 centroids", PARTS, {"fc.weight.centroids": torch.zeros(4, 4).half()}),
    "other centroids": (
        *("int8 centroids", "centroids' shape"),
        {"fc.weight.centroids": torch.zeros(4, 2, dtype=torch.uint8)},
    ),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_tensors_that_contradict_the_manifest_are_refused_by_name(place, name):
    plan, message, tensors = WRONG_TENSORS[name]
    forge(place, packed_zoo(plan=plan), **tensors)
    refused(place, message)


WRONG_ENTRIES = {
    "other bits": ("int8", entry(scheme="int4")),
    "another shape": ("int8", entry(shape=[8, 16])),
    "a huge shape": ("int8", entry(shape=[10**30, 8])),
    "two channels of eight": ("int8", entry(channels=2)),
    "channels whose scales are missing": ("int8", entry(channels=8)),
    "one channel of eight": ("int4 by channel", entry(channels=1)),
    "centroids of 16 bits": ("int8 centroids", entry(centroid_bits=16)),
}


@pytest.mark.parametrize("name", WRONG_ENTRIES)
def test_a_manifest_that_contradicts_the_tensors_is_refused_by_name(place, name):
    plan, edit = WRONG_ENTRIES[name]
    forge(place, packed_zoo(plan=plan), edit)
    refused(place)


def test_centroids_with_a_scale_for_each_row_are_refused(place):
    """A codebook has one range."""
    forge(place, packed_zoo(plan="int8 centroids"), entry(channels=8), **{AFFINE: affine(channels=8)})
    refused(place)


def test_more_centroids_than_a_byte_tells_apart_are_refused(place):
    tensors = {"fc.weight.centroids": torch.zeros(300, 4).half(), "fc.weight.codes": torch.zeros(18, dtype=torch.uint8)}
    forge(place, packed_zoo(), entry(n_centroids=300), **tensors)
    refused(place, kind="model.safetensors: ")


RANGES = [{"low": 2.0, "high": 1.0}, {"low": NAN}, {"high": NAN}, {"high": INF}, {"bits": 9}, {"low": "-1"}, {"low": 0}]


@pytest.mark.parametrize("changes", RANGES, ids=str)
def test_ranges_of_inputs_that_no_version_writes_are_refused(place, changes):
    forge(place, packed_zoo(plan="inputs"), lambda m: m["inputs"]["fc"].update(changes))
    refused(place, kind="model.safetensors: its manifest is damaged")
