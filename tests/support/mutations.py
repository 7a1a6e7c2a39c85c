"""Mutations of a packed file: what falls on it by accident, and what somebody makes on purpose.

`Blind` ones change bytes and leave the hash as it was. `Forged` ones change the header, the manifest or a tensor and
make the hash right again: nobody needs a secret for it. Each is a function of a file's bytes and a random generator.
"""

import copy
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

KEY, ZEROS = "fairseq_quant_noise", "0" * 64
Random = random.Random
HUGE = (2**31, 2**53, 2**63, 2**64 - 1, 10**30, -1, 0, 1)
STRANGE = (None, True, -1, 0, 3, 1.5, 1e308, "", "x", "0" * 40, [], [[]], {}, {"a": 1}, [1] * 100)
PATHS = (
    "../../etc/passwd",
    "/etc/passwd",
    "a/../b",
    "C:\\x",
    "~",
    "a\x00b",
    "\x1b[2J\x1b[31m",
    "\u202eabc",
    "\ud800",
    "",
)
CODE = (
    "__import__('os').system('touch CANARY')",
    "${oc.env:HOME}",
    "${oc.create:${model}}",
    "${model.arch}",
    "[x for x in ()]",
    "9**9**9**9**9",
)
TYPES = ("F16", "F32", "BF16", "U8", "I64", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "X9", "")


@dataclass
class Parts:
    """A packed file taken apart."""

    header: dict[str, Any]
    manifest: dict[str, Any]
    data: bytes

    @classmethod
    def of(cls, content: bytes) -> "Parts":
        """The parts of a whole file."""
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        return cls(header, json.loads(header["__metadata__"][KEY]), content[8 + length :])

    def join(self, text: Callable[[str], str] = str) -> bytes:
        """The file again, its hash made right; `text` may change the header's JSON last."""
        self.manifest["sha256"] = ZEROS
        self.header["__metadata__"] = {KEY: json.dumps(self.manifest, separators=(",", ":"))}
        header = text(json.dumps(self.header, separators=(",", ":"))).encode("utf-8", "surrogatepass")
        content = len(header).to_bytes(8, "little") + header + self.data
        return content.replace(ZEROS.encode(), hashlib.sha256(content).hexdigest().encode(), 1)

    def tensor(self, rng: Random) -> dict[str, Any]:
        """The header's entry of some tensor."""
        return self.header[rng.choice([name for name in self.header if name != "__metadata__"])]


# Blind


def flip_bits(content: bytes, rng: Random) -> bytes:
    """One to eight bits, half of the time in the header."""
    changed = bytearray(content)
    end = 8 * len(content) if rng.random() < 0.5 else 64 + 8 * int.from_bytes(content[:8], "little")
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        bit = rng.randrange(end)
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def cut(content: bytes, rng: Random) -> bytes:
    """The beginning alone."""
    return content[: rng.choice((rng.randrange(len(content)), rng.randrange(16), len(content) - 1))]


def grow(content: bytes, rng: Random) -> bytes:
    """Something after the end."""
    return content + rng.choice((b"\0", b"x" * 100, content, content[:50]))


def splice(content: bytes, rng: Random) -> bytes:
    """A piece of the file in the place of another."""
    size = rng.randrange(1, min(len(content) // 2, 400))
    start, end = rng.randrange(len(content) - size), rng.randrange(len(content) - size)
    return content[:end] + content[start : start + size] + content[end + rng.choice((0, size)) :]


def overwrite(content: bytes, rng: Random) -> bytes:
    """Random bytes over some of it, or zeros, as a disk leaves them."""
    size = rng.randrange(1, 600)
    start = rng.randrange(len(content))
    return content[:start] + rng.choice((rng.randbytes(size), bytes(size))) + content[start + size :]


def header_length(content: bytes, rng: Random) -> bytes:
    """Another length of the header."""
    length = rng.choice((0, 1, 2, len(content), len(content) - 8, 2**31, 2**63, 2**64 - 1, rng.randrange(10**6)))
    return length.to_bytes(8, "little") + content[8:]


def other_header(content: bytes, rng: Random) -> bytes:
    """A header that is no JSON, no UTF-8, nested without end, or long."""
    deep = b"[" * rng.choice((100, 5000, 100_000))
    known = (
        b"",
        b"{}",
        b"[]",
        b"5",
        b"\xff\xfe{}",
        b"\xed\xa0\x80",
        deep,
        b'{"a":' * 5000,
        b"[[],",
        b'"' + b"x" * 10**5,
    )
    header = rng.choice((*known, b"[" + b"[]," * 300_000 + b"[]]", b'{"__metadata__":' + deep))
    return len(header).to_bytes(8, "little") + header + content[-100:]


def junk(content: bytes, rng: Random) -> bytes:
    """Another kind of file."""
    starts = (b"", b"PK\x03\x04", b"\x80\x02", b"\x1f\x8b\x08", b"<html>", b"\x7fELF", b"once upon a time\n")
    return rng.choice(starts) + rng.randbytes(rng.randrange(300))


# Forged


def entry_value(content: bytes, rng: Random) -> bytes:
    """Another value in what the manifest says of a quantized tensor."""
    parts = Parts.of(content)
    if not parts.manifest["tensors"]:
        return flip_bits(content, rng)
    entry = rng.choice([*parts.manifest["tensors"].values()])
    key = rng.choice(("scheme", "shape", "block_size", "n_centroids", "centroid_bits", "channels", "other"))
    shapes = ([10**30, 8], [16], [], [8, 2**62], [2**32, 2**32], [1] * 5000, [-8, -8], [8.0, 8], [entry["shape"]])
    values = shapes if key == "shape" else (*HUGE, *STRANGE, "pq", "int2", "int8", "int99", 2, 4, 255, 256, 257)
    entry[key] = rng.choice(values)
    return parts.join()


def reshape(content: bytes, rng: Random) -> bytes:
    """A shape of as many numbers."""
    parts = Parts.of(content)
    entry = rng.choice([*parts.manifest["tensors"].values(), {"shape": [2, 3]}])
    rng.shuffle(entry["shape"])
    entry["shape"] = rng.choice((entry["shape"], [*entry["shape"], 1], [1, *entry["shape"]]))
    return parts.join()


def tensor_header(content: bytes, rng: Random) -> bytes:
    """Another dtype, shape or place of a stored tensor: overlaps, holes, beyond the end, bombs."""
    parts = Parts.of(content)
    entry, other = parts.tensor(rng), parts.tensor(rng)
    key, value = rng.choice(
        (
            *(("dtype", kind) for kind in TYPES),
            *(("shape", [size]) for size in HUGE),
            *(("shape", shape) for shape in ([2**62, 0], [2**32, 2**32], [], [0], other["shape"], "x", [1] * 70)),
            *(("data_offsets", [0, size]) for size in HUGE),
            *(("data_offsets", place) for place in (other["data_offsets"], [5, 3], [0], [], [0, 0], None)),
        )
    )
    entry[key] = value
    return parts.join()


def names(content: bytes, rng: Random) -> bytes:
    """Tensors under other names: paths, control characters, parts of others, one twice, one gone, one more."""
    parts = Parts.of(content)
    stored = [name for name in parts.header if name != "__metadata__"]
    old, new = rng.choice(stored), rng.choice((*PATHS, *stored, *parts.manifest["tensors"], "x", "a" * 10_000))
    how = rng.randrange(4)
    if how == 0:
        parts.header[new] = parts.header.pop(old)
    elif how == 1:
        parts.header.pop(old)
    elif how == 2:
        parts.header[new] = {"dtype": "U8", "shape": [0], "data_offsets": [len(parts.data)] * 2}
    else:
        twice = json.dumps(old) + ":" + json.dumps(parts.header[old]) + ","
        return parts.join(lambda text: "{" + twice + text[1:])
    return parts.join()


def renamed_entry(content: bytes, rng: Random) -> bytes:
    """A quantized tensor under another name in the manifest."""
    parts = Parts.of(content)
    tensors = parts.manifest["tensors"]
    if not tensors:
        return flip_bits(content, rng)
    old = rng.choice([*tensors])
    entry = tensors[old] if rng.random() < 0.5 else tensors.pop(old)
    tensors[rng.choice((*PATHS, *parts.header, "x"))] = copy.deepcopy(entry)
    return parts.join()


def ties_and_layers(content: bytes, rng: Random) -> bytes:
    """Ties in circles, to nothing, onto what is stored, in great number; maps that point outside, or stand for much."""
    parts = Parts.of(content)
    stored = [*parts.manifest["tensors"], *(name for name in parts.header if name != "__metadata__")]
    if rng.random() < 0.5:
        one, two = rng.choice((*stored, "x", *PATHS)), rng.choice((*stored, "x", 5, None, [], *PATHS))
        many = {f"copy{i}": rng.choice(stored) for i in range(rng.choice((1, 20_000)))}
        parts.manifest["ties"] = rng.choice(({one: two}, {one: two, "x": one}, {"x": "x"}, many, [], 5, None))
    else:
        stack = rng.choice(("layers", "decoder.layers", "encoder.sentence_encoder.layers", "", *PATHS))
        maps = ([0, 0, 2, 2], [0, 5], [0, -1], [0] * 100_000, [1, 0], [0, 2**63], "00", None, {}, [0.0], [], [False])
        parts.manifest["layers"] = rng.choice(({stack: rng.choice(maps)}, [], {stack: {}}, None))
    return parts.join()


def manifest_value(content: bytes, rng: Random) -> bytes:
    """Another value of the manifest, or one key less or more."""
    parts = Parts.of(content)
    key = rng.choice((*parts.manifest, "other", "format_version"))
    if rng.random() < 0.3:
        parts.manifest.pop(key, None)
    else:
        known = parts.manifest.get(key)
        parts.manifest[key] = rng.choice((*STRANGE, *PATHS, 4, "3", 3.0, [known], {"x": known}))
    return parts.join()


def dense(content: bytes, rng: Random) -> bytes:
    """What dense tensors in fp16 stand for, in a version that says it or one that does not."""
    parts = Parts.of(content)
    parts.manifest["dense"] = rng.choice(("F32", "F32", "F16", "", *STRANGE))
    if rng.random() < 0.7:
        parts.manifest["format_version"] = 7
    if rng.random() < 0.5:
        parts.tensor(rng)["dtype"] = rng.choice(TYPES)
    return parts.join()


def inputs(content: bytes, rng: Random) -> bytes:
    """Ranges of inputs that no version writes."""
    parts = Parts.of(content)
    entry = {
        "bits": rng.choice((8, *STRANGE)),
        "low": rng.choice((-1.0, *STRANGE)),
        "high": rng.choice((1.0, *STRANGE)),
    }
    module = rng.choice(("fc", "decoder.layers.0.fc1", "nowhere", "", *PATHS))
    parts.manifest["inputs"] = rng.choice(({module: entry}, {module: {}}, {module: 5}, []))
    return parts.join()


def configuration(content: bytes, rng: Random) -> bytes:
    """A configuration that would run code, import by name, build without end, or is none."""
    parts = Parts.of(content)
    model = parts.manifest["model"]
    sections = [section for section in model.get("cfg", {}).values() if isinstance(section, dict)]
    options = rng.choice(sections or [model])
    key = rng.choice((*options, *model, "_target_", "_name", "arch", "user_dir", "adaptive_softmax_cutoff", "data"))
    into = rng.choice((options, options, model))
    into[key] = rng.choice((*STRANGE, *HUGE, *CODE, *PATHS, "os.system", "no_such_model", {"_target_": "os.system"}))
    if rng.random() < 0.1:
        model.update(rng.choice(({"cfg": []}, {"cfg": {"model": 5}}, {"cfg": {"common": {"user_dir": "/tmp"}}})))
    return parts.join()


def numbers(content: bytes, rng: Random) -> bytes:
    """Numbers in the JSON that no number is: NaN, infinities, thousands of digits."""
    number = rng.choice(("NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, "-0", "1" * 400 + ".5"))
    parts = Parts.of(content)
    parts.manifest["model"]["x" if rng.random() < 0.5 else "vocab_size"] = "NUMBER"
    return parts.join(lambda text: text.replace('\\"NUMBER\\"', number))


def twice(content: bytes, rng: Random) -> bytes:
    """A key of the manifest twice."""
    parts = Parts.of(content)
    key = rng.choice([*parts.manifest])
    more = json.dumps(f'"{key}":{json.dumps(rng.choice(STRANGE))},')[1:-1]
    return parts.join(lambda text: text.replace(f'"{KEY}":"{{', f'"{KEY}":"{{{more}', 1))


def data(content: bytes, rng: Random) -> bytes:
    """Other numbers: codes beyond K, centroids and scales that are not finite, anything."""
    parts = Parts.of(content)
    entry = parts.tensor(rng)
    start, end = entry["data_offsets"]
    fill = rng.choice((b"\xff", b"\x00", b"\x7f", b"\x00\x7c", b"\x00\x00\x80\x7f", rng.randbytes(8)))
    new = (fill * (end - start))[: end - start]
    if rng.random() < 0.5 and end > start:
        at = rng.randrange(end - start)
        new = (parts.data[start : start + at] + rng.randbytes(1) + parts.data[start + at + 1 : end])[: end - start]
    parts.data = parts.data[:start] + new + parts.data[end:]
    return parts.join()


def bomb(content: bytes, rng: Random) -> bytes:
    """Few bytes that stand for a network of terabytes, as far as its own words go: each code a block of a million."""
    parts = Parts.of(content)
    d, rows = rng.choice((10**4, 10**5)), rng.choice((64, 10**4, 10**5))
    blob = bytes(2 * d + rows // 8)
    at = len(parts.data)
    parts.data += blob
    parts.header["bomb.centroids"] = {"dtype": "F16", "shape": [1, d], "data_offsets": [at, at + 2 * d]}
    parts.header["bomb.codes"] = {"dtype": "U8", "shape": [rows // 8], "data_offsets": [at + 2 * d, at + len(blob)]}
    parts.manifest["tensors"]["bomb"] = {"scheme": "pq", "shape": [rows, d], "block_size": d, "n_centroids": 1}
    return parts.join()


def padding(content: bytes, rng: Random) -> bytes:
    """Spaces or lists without end in the header; memory for JSON is many times its length."""
    parts = Parts.of(content)
    if rng.random() < 0.5:
        return parts.join(lambda text: text + " " * rng.choice((1, 100, 10**6, 2 * 10**6)))
    parts.manifest["plan"] = {"x": [[]] * rng.choice((10, 10**5, 4 * 10**5))}
    return parts.join()


BLIND = (flip_bits, cut, grow, splice, overwrite, header_length, other_header, junk)
FORGED = (
    *(entry_value, reshape, tensor_header, names, renamed_entry, ties_and_layers, manifest_value, dense, inputs),
    *(configuration, configuration, numbers, twice, data, bomb, padding),
)


def mutate(content: bytes, rng: Random) -> tuple[str, bool, bytes]:
    """A mutation's name, whether it makes the hash right again, and its file."""
    forged = rng.random() > 0.35
    kind = rng.choice(FORGED if forged else BLIND)
    return kind.__name__, forged, kind(content, rng)
