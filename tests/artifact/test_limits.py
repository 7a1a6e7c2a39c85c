"""docs/file_format.md says what `read` takes: each of its limits is taken, and one beyond it is refused."""

import json
import re
from pathlib import Path

import pytest
from mutations import Parts
from packed_files import damaged, packed_zoo

from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.artifact.limits import longest_header
from fairseq_quant_noise.artifact.writer import serialize

TEXT = (Path(__file__).parents[2] / "docs/file_format.md").read_text()
ROWS = re.findall(
    r"^\| (.+?) \| (\S+) \| (.+) \|$", TEXT[TEXT.index("### Limits") : TEXT.index("## Sizes")], re.MULTILINE
)
LIMITS = {what: (low, high) for what, low, high in ROWS if what != "what" and set(low) != {"-"}}
HEADER, DENSE = "bytes of the header, H", "dense bytes of the quantized tensors, 4 a number, for a byte of the file"


def number(text):
    """A number as the page writes it."""
    sign, text = (-1, text[1:]) if text.startswith("-") else (1, text)
    base, _, power = text.replace(",", "").partition("^")
    return sign * (int(base) ** int(power) if power else float(base) if "e" in base else int(base))


@pytest.fixture(scope="module")
def content():
    return bytes(serialize(packed_zoo(plan="inputs")))


@pytest.fixture
def parts(content):
    """A whole file, taken apart."""
    return Parts.of(content)


@pytest.fixture
def place(tmp_path):
    return tmp_path / "model.safetensors"


def store(parts, name, dtype, shape, data):
    """One more stored tensor."""
    start = len(parts.data)
    parts.data += data
    parts.header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, len(parts.data)]}


def quantized(parts, shape, d=4, k=1, bits=1):
    """One more tensor in codes, all of them 0."""
    numbers = 1
    for size in shape:
        numbers *= size
    store(parts, "more.codes", "U8", [(numbers // d * bits + 7) // 8], bytes((numbers // d * bits + 7) // 8))
    store(parts, "more.centroids", "F16", [k, d], bytes(2 * k * d))
    parts.manifest["tensors"]["more"] = {"scheme": "pq", "shape": shape, "block_size": d, "n_centroids": k}


def centroids(parts, k):
    quantized(parts, [2, 8], k=k, bits=max((k - 1).bit_length(), 1))
    parts.manifest["format_version"] = 6 if k > 256 else 3


def dimensions(parts, n):
    quantized(parts, [8, *[1] * (n - 2), 8] if n > 1 else [64])


def an_input(key):
    return lambda parts, value: parts.manifest["inputs"]["fc"].update({key: value})


def both_ends(parts, value):
    parts.manifest["inputs"]["fc"].update(low=min(value, 0.0), high=max(value, 0.0))


def copies(parts, n):
    """100 stored tensors in all, and as many layers in use as that takes; the rest in ties."""
    for i in range(100 - len(parts.header) + 1):
        store(parts, f"layers.0.t{i}", "U8", [1], b"\0")
    stored = len(parts.header) - 1
    parts.manifest["ties"] = {f"copy{i}": "fc.bias" for i in range(n % stored)}
    parts.manifest["layers"] = {"layers": [0] * (n // stored)}


def option(name, value):
    return {"cfg": {"model": {name: value}}}


def entries(n):
    return option("x", [1] * n)


def nested(levels):
    inner: list = []
    for _ in range(levels - 4):  # `model`, `cfg`, its section, and the innermost list
        inner = [inner]
    return option("x", inner)


#: For each row of the table: a file that is at this value.
FILES = {
    "dimensions of a quantized tensor": dimensions,
    "centroids, K": centroids,
    "bits of an input": an_input("bits"),
    "`low` and `high` of an input": both_ends,
    "ties, and for each layer in use every stored tensor": copies,
}
CONFIGURATIONS = {
    "`model`: values, with objects and lists counted as one each": lambda n: {"classes": ["x"] * (n - 2)},
    "`model`: objects and lists inside one another, `model` itself among them": nested,
    "`model`: entries of an object or a list two levels inside it or more, as the sections of `cfg` are": lambda n: (
        option("x", [1] * n)
    ),
    "`model`: an option whose name ends in `layers`": lambda n: option("decoder_layers", n),
    "`model`: `tokens_per_sample`, and an option whose name ends in `positions`": lambda n: option("max_positions", n),
    "`model`: any other number": lambda n: option("x", n),
}
#: Whose least value nothing is below, or no whole file can have.
LOWEST = ("0", "1")


def file_at(parts, what, value):
    if what in CONFIGURATIONS:
        parts.manifest["model"] = CONFIGURATIONS[what](value)
    else:
        FILES[what](parts, value)
    return parts.join()


def test_every_limit_on_the_page_is_tried():
    assert set(LIMITS) == {HEADER, DENSE, *FILES, *CONFIGURATIONS}


@pytest.mark.parametrize("what", [*FILES, *CONFIGURATIONS])
def test_a_limit_is_taken_and_one_beyond_it_is_refused(content, place, what):
    low, high = map(number, LIMITS[what])
    step = 1e37 if isinstance(high, float) else 1
    taken, beyond = [high], [high + step]
    if LIMITS[what][0] not in LOWEST or what == "centroids, K":
        taken.append(low)
        beyond.append(low - step)
    for value in taken:
        place.write_bytes(file_at(Parts.of(content), what, value))
        read(place)
    for value in beyond:
        place.write_bytes(file_at(Parts.of(content), what, value))
        with damaged():
            read(place)


def padded(parts, size):
    """The file with spaces at the header's end, so that it has this many bytes."""
    return parts.join(lambda text: text + " " * (size - len(parts.join())))


def test_the_longest_header_is_taken_and_one_byte_more_is_refused(parts, place):
    most, share, absolute = (int(n.replace(",", "")) for n in re.findall(r"[\d,]{2,}", LIMITS[HEADER][1]))
    rest = 8 + len(parts.data)
    longest = next(h for h in range(most, 2 * most) if h + 1 > most + (rest + h + 1) // share)
    place.write_bytes(padded(parts, rest + longest))
    read(place)
    place.write_bytes(padded(parts, rest + longest + 1))
    with damaged("a header of"):
        read(place)
    assert longest_header(10**12) == absolute


def test_as_many_dense_bytes_as_the_file_may_stand_for_are_taken(place):
    rows, parts = 1 << 14, Parts({}, json.loads(packed_zoo().manifest.to_json()), b"")
    parts.manifest.update(tensors={}, ties={})
    quantized(parts, [rows, number(LIMITS[DENSE][1]) // 4], d=number(LIMITS[DENSE][1]) // 4)
    place.write_bytes(padded(parts, rows))
    read(place)
    place.write_bytes(padded(parts, rows - 1))
    with damaged("which no file of"):
        read(place)


def upper_case(parts):
    content = parts.join()
    digits = Parts.of(content).manifest["sha256"]
    return content.replace(digits.encode(), digits.upper().encode())


def with_manifest(**changes):
    return lambda parts: (parts.manifest.update(changes), parts.join())[1]


def with_input(**changes):
    return lambda parts: (parts.manifest["inputs"]["fc"].update(changes), parts.join())[1]


def with_entry(**changes):
    return lambda parts: (parts.manifest["tensors"]["fc.weight"].update(changes), parts.join())[1]


def with_metadata(parts):
    return parts.join(lambda text: text.replace('"__metadata__":{', '"__metadata__":{"other":"x",'))


def twice(parts):
    return parts.join(lambda text: text.replace('\\"plan\\":', '\\"producer\\":\\"x\\",\\"plan\\":'))


def without(key):
    return lambda parts: (parts.manifest.pop(key), parts.join())[1]


def gap(parts):
    parts.data += b"\0"
    return parts.join()


def stored_as(name):
    return lambda parts: (store(parts, name, "U8", [1], b"\0"), parts.join())[1]


RANGE, MAP = "a range of inputs that no version writes", "a map of layers that no version writes"
FORMS = "is in the file in two forms"
#: What the page says in words; a file that is so, and TAKEN, or that is not so, and why it is refused.
TAKEN = ""
WORDS = {
    "may end in spaces": (lambda parts: parts.join(lambda text: text + "   "), TAKEN),
    "without gaps, to the last byte": (gap, "not a whole safetensors file"),
    "and does not look at others": (with_metadata, TAKEN),
    "this package does not look at others": (with_manifest(other=5), TAKEN),
    "All keys are there": (without("plan"), "KeyError: 'plan'"),
    "no object has a key twice": (twice, "a key twice"),
    "every number is finite": (with_manifest(plan={"x": float("inf")}), "Infinity is no number"),
    "are printable": (with_manifest(producer="a\nb"), "a name that is not plain text"),
    "64 hexadecimal digits in lower case": (upper_case, "does not match its SHA-256"),
    "has these keys and no others": (with_entry(other=1), "unexpected keyword argument 'other'"),
    "Keys with their default may be left out": (with_entry(channels=1, centroid_bits=16), TAKEN),
    "(`1.0`, not `1`)": (with_input(high=10**3), RANGE),
    "low <= high": (with_input(low=2.0, high=1.0), RANGE),
    "No other stored tensor and no copy in `ties` is called NAME": (stored_as("fc.weight"), FORMS),
    "or NAME.X (X without a point)": (stored_as("fc.weight.x"), FORMS),
    "COPY is not": (with_manifest(ties={"fc.bias": "fc.weight"}), "tied to 'fc.weight' as well"),
    "it has itself in the list": (with_manifest(layers={"x": [0, 0, 1]}), MAP),
    "at least one tensor in the file": (with_manifest(layers={"x": [0, 0]}), "is in use, and not in the file"),
}


@pytest.mark.parametrize("words", WORDS)
def test_the_page_says_in_words_what_is_taken_and_what_is_not(parts, place, words):
    assert words in " ".join(TEXT.split())
    change, refusal = WORDS[words]
    place.write_bytes(change(parts))
    if refusal == TAKEN:
        read(place).state_dict()
    else:
        with damaged(re.escape(refusal)):
            read(place)
