"""What fairseq's metrics leave in a checkpoint is read: numbers of numpy in any container, and every kind of meter."""

import inspect
import pickle

import fairseq.logging.meters
import numpy as np
import pytest
import torch
from fairseq.logging.meters import Meter, MetersDict
from toys import refuses

from fairseq_quant_noise.checkpoints.safe_load import safe_load
from fairseq_quant_noise.errors import DamagedFileError

KINDS = ["?", *(f"{letter}{size}" for letter in "ui" for size in (1, 2, 4, 8)), "f2", "f4", "f8"]
ARRAYS = [
    *(np.array([[1, 0, 3], [4, 5, 6]]).astype(kind) for kind in KINDS),
    np.array([1.5, np.nan, -np.inf]),
    np.array(3),
    np.zeros((0, 4)),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(3, dtype=">i4"),
]


def save(path, **content):
    torch.save({"model": {"w": torch.ones(2)}, **content}, path)
    return path


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype.str}-{array.shape}")
def test_an_array_comes_back_as_it_was(tmp_path, array):
    shared = {"x": array}
    saved = {"metrics": [(1, "n", {"sum": array}), [array], shared, shared]}
    read = safe_load(save(tmp_path / "checkpoint.pt", extra_state=saved))["extra_state"]["metrics"]
    for found in (read[0][2]["sum"], read[1][0], read[2]["x"]):
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    assert read[2] is read[3]


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_both_names_of_numpys_module_are_read(tmp_path, core):
    """numpy 2 writes numpy._core, numpy 1 numpy.core."""
    there = np.zeros(1).__reduce__()[0].__module__.removesuffix(".multiarray").encode()
    plain = pickle.dumps({"model": {}, "extra_state": {"n": np.arange(3)}}, protocol=2)
    assert there in plain
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": {}}, path, _use_new_zipfile_serialization=False)
    content = pickle.dumps({"model": {}}, protocol=2)
    path.write_bytes(path.read_bytes().replace(content, plain.replace(there, core.encode())))
    assert safe_load(path)["extra_state"]["n"].tolist() == [0, 1, 2]


def filled(meter):
    """A meter that has counted an array, a tensor and a number of numpy, where its kind takes them."""
    if callable(getattr(meter, "stop", None)):
        meter.start()
        meter.stop(np.int64(3))
    elif type(meter).__name__ == "ConcatTensorMeter":
        meter.update(torch.ones(2))
    else:
        meter.update(np.array([4, 3, 2, 1]) if type(meter).__name__ != "TimeMeter" else np.float64(2))
    return meter


METERS = [
    kind
    for _, kind in inspect.getmembers(fairseq.logging.meters, inspect.isclass)
    if issubclass(kind, Meter) and kind is not Meter
]


@pytest.mark.parametrize("kind", METERS, ids=lambda kind: kind.__name__)
def test_every_kind_of_meter_goes_on_where_it_was(tmp_path, kind):
    meters = MetersDict()
    meters.add_meter("found", filled(kind()), 10)
    state = safe_load(save(tmp_path / "checkpoint.pt", extra_state={"metrics": meters.state_dict()}))
    again = MetersDict()
    again.load_state_dict(state["extra_state"]["metrics"])
    before, after = meters["found"].state_dict(), again["found"].state_dict()
    assert before.keys() == after.keys()
    for name in before.keys() - {"init", "start"}:  # clocks start anew
        np.testing.assert_allclose(np.asarray(before[name], float), np.asarray(after[name], float), rtol=1e-3)


class State:
    """Unpickling it makes an array of this state."""

    def __init__(self, *state):
        self.state = state

    def __reduce__(self):
        make, arguments, _ = np.zeros(1).__reduce__()
        return make, arguments, self.state

    def __str__(self):
        return f"state {self.state}"


@pytest.mark.parametrize(
    "value",
    [
        np.array([None], dtype=object),
        np.array(["text"]),
        np.array([b"bytes"]),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
        np.complex128(1j),
        State(1, (10**9,), np.dtype("f8"), False, b"\0" * 8),
        State(1, (2,), np.dtype("f8"), False, b"\0" * 7),
        State(1, (-1, -1), np.dtype("u1"), False, b"\0" * 4),
        State(1, (1,), "f8", False, b"\0" * 8),
        State(1, "shape", np.dtype("f8"), False, "text"),
        State(),
    ],
    ids=str,
)
def test_what_is_no_array_of_numbers_is_refused(tmp_path, value):
    with refuses("refused, .*numpy", DamagedFileError):
        safe_load(save(tmp_path / "checkpoint.pt", extra_state={"metrics": [value]}))


@pytest.mark.parametrize("part", ["model", "cfg", "args"])
def test_an_array_where_none_belongs_is_refused(tmp_path, part):
    with refuses("refused", DamagedFileError):
        safe_load(save(tmp_path / "checkpoint.pt", **{part: {"w": np.ones(2)}}))


def test_a_list_that_holds_itself_ends(tmp_path):
    loop = [1]
    loop += [loop, {"again": loop}]
    read = safe_load(save(tmp_path / "checkpoint.pt", extra_state={"metrics": loop}))["extra_state"]["metrics"]
    assert read[1] is read
