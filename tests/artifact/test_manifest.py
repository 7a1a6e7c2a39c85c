"""What a packed file says about itself."""

import json
from dataclasses import replace

import pytest
from toys import refuses

from fairseq_quant_noise.artifact.manifest import FORMAT_VERSION, ZERO_HASH, Manifest, QuantizedTensor
from fairseq_quant_noise.errors import DamagedFileError

FULL = Manifest(
    producer="fairseq_quant_noise 0.1.0",
    model={"architecture": "quant_noise_transformer_lm", "cfg": {"model": {"é": [1, None]}}, "vocab_size": 9},
    plan={"noise": [], "stages": [{"match": "decoder\\.fc", "block_size": {"default": 8}}]},
    tensors={
        "fc.weight": QuantizedTensor("pq", (6, 8), 4, 3),
        "c.weight": QuantizedTensor("pq", (2, 1, 3, 3), 9, 2, centroid_bits=8),
        "q.weight": QuantizedTensor("int4", (6, 8), channels=6),
    },
    ties={"out.weight": "fc.weight"},
    inputs={"fc": {"bits": 8, "low": -1.5, "high": 2.25}},
)


@pytest.mark.parametrize("manifest", [Manifest("me"), FULL], ids=["empty", "full"])
def test_a_manifest_comes_back_from_its_json(manifest):
    assert Manifest.from_json(manifest.to_json("ab" * 32)) == (manifest, "ab" * 32)
    assert Manifest.from_json(manifest.to_json())[1] == ZERO_HASH


def test_the_json_is_one_line_of_ascii_with_sorted_keys():
    text = FULL.to_json()
    assert "\n" not in text
    assert text.isascii()
    keys = list(json.loads(text))
    names = ["format_version", "inputs", "layers", "model", "plan", "producer", "sha256", "tensors", "ties"]
    assert keys == sorted(keys) == names


def test_the_order_of_entries_does_not_change_the_bytes():
    backwards = replace(FULL, tensors=dict(reversed(FULL.tensors.items())))
    assert backwards.to_json() == FULL.to_json()


def edited(**changes):
    return json.dumps(json.loads(FULL.to_json()) | changes)


def entry(**changes):
    good = {"scheme": "pq", "shape": [6, 8], "block_size": 4, "n_centroids": 3}
    return edited(tensors={"fc.weight": good | changes})


def inputs(**changes):
    return edited(inputs={"fc": {"bits": 8, "low": -1.0, "high": 1.0} | changes})


@pytest.mark.parametrize("version", [0, 1, FORMAT_VERSION + 1, "1", None, 1.5, 3.0, True])
def test_an_unknown_version_is_refused_with_the_known_one(version):
    message = rf"format version .* is unknown here \(this package reads 3 to {FORMAT_VERSION}\); update"
    with refuses(message, DamagedFileError):
        Manifest.from_json(edited(format_version=version))


DAMAGED = {
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "a number": "1",
    "null": "null",
    "deep": "[" * 100_000,
    "an empty mapping": "{}",
    "without a hash": json.dumps({"format_version": FORMAT_VERSION}),
    "tensors is a list": edited(tensors=[]),
    "a tensor is a list": edited(tensors={"fc": []}),
    "a tensor is a string": edited(tensors={"fc": "pq"}),
    "a scheme that no version writes": entry(scheme="int9"),
    "a scheme that is a list": entry(scheme=["pq"]),
    "codes of numbers with blocks": entry(scheme="int4"),
    "codes of numbers with centroids": entry(scheme="int4", block_size=None),
    "pq without blocks": entry(block_size=None),
    "centroids of 4 bits": entry(centroid_bits=4),
    "centroids of a fraction of bits": entry(centroid_bits=8.0),
    "no channels": entry(channels=0),
    "channels of a fraction": entry(channels=1.0),
    "a vector": entry(shape=[48]),
    "a codebook without a name": entry(codebook=""),
    "more centroids than 12 bits tell apart": entry(n_centroids=4097),
    "codes of 9 bits in a version without": entry(n_centroids=257),
    "transposed by a number": entry(transposed=1),
    "transposed in a version without": entry(transposed=True),
    "inputs is a list": edited(inputs=[]),
    "inputs is missing": json.dumps({k: v for k, v in json.loads(FULL.to_json()).items() if k != "inputs"}),
    "inputs of a number": edited(inputs={"fc": 8}),
    "inputs of 9 bits": inputs(bits=9),
    "inputs of a word of bits": inputs(bits="8"),
    "inputs without an end": edited(inputs={"fc": {"bits": 8, "low": -1.0}}),
    "inputs with the ends swapped": inputs(low=2.0),
    "inputs from NaN": inputs(low=float("nan")),
    "inputs to NaN": inputs(high=float("nan")),
    "inputs to infinity": inputs(high=float("inf")),
    "inputs beyond float32": inputs(high=1e300),
    "inputs from a word": inputs(low="-1.0"),
    "inputs from nothing": inputs(low=None),
    "inputs to a whole number": inputs(high=1),
    "inputs of a name of two lines": edited(inputs={"a\nb": {"bits": 8, "low": -1.0, "high": 1.0}}),
    "a shape that is a number": entry(shape=8),
    "a shape of strings": entry(shape=["6", "8"]),
    "a negative shape": entry(shape=[-6, 8]),
    "a shape of zero": entry(shape=[0, 8]),
    "a shape of truths": entry(shape=[True, 8]),
    "an empty shape": entry(shape=[]),
    "blocks of zero": entry(block_size=0),
    "blocks of a fraction": entry(block_size=4.0),
    "no centroids": entry(n_centroids=0),
    "an unknown field": entry(bits=8),
    "ties is a list": edited(ties=[]),
    "ties is null": edited(ties=None),
    "ties is a string": edited(ties="a"),
    "a tie to a number": edited(ties={"a": 5}),
    "a tie to a list": edited(ties={"a": []}),
    "model is a list": edited(model=[]),
    "plan is a number": edited(plan=5),
    "producer is null": edited(producer=None),
    "the hash is a number": edited(sha256=5),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_manifest_is_refused_in_one_line(text):
    with refuses("manifest is damaged", DamagedFileError):
        Manifest.from_json(text)


def test_a_transposed_tensor_has_a_version_of_its_own():
    tensor = QuantizedTensor("int8", (6, 8, 2), transposed=True)
    manifest = Manifest("me", tensors={"up.weight": tensor})
    assert (FULL.format_version, manifest.format_version) == (3, 5)
    assert Manifest.from_json(manifest.to_json())[0] == manifest
    assert tensor.dense_shape == (8, 6, 2)


@pytest.mark.parametrize("others", [{}, {"transposed": True}, {"codebook": "other.weight"}], ids=str)
@pytest.mark.parametrize(("k", "version"), [(256, None), (257, 6), (4096, 6)])
def test_codes_of_more_than_a_byte_have_a_version_of_their_own(k, version, others):
    plain = QuantizedTensor("pq", (6, 8), 4, k)
    manifest = Manifest("me", tensors={"other.weight": plain, "fc.weight": replace(plain, **others)})
    before = 5 if others.get("transposed") else 4 if others else 3
    assert manifest.format_version == (version or before)
    assert Manifest.from_json(manifest.to_json())[0] == manifest
