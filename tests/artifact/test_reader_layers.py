"""The map of shared layers in a file that may come from anywhere."""

import pytest
from packed_files import damaged, forge
from stacks import net
from torch import nn
from toys import refuses

from fairseq_quant_noise import load, share_layers_
from fairseq_quant_noise.artifact import pack, read, write


@pytest.fixture
def packed():
    return pack(share_layers_(net(), 2))


@pytest.fixture
def place(tmp_path):
    return tmp_path / "model.safetensors"


def layers(value, stack="layers"):
    """An edit of the manifest's map."""
    return lambda manifest: manifest["layers"].update({stack: value})


WRONG = {
    "a later layer": [0, 2, 2, 2],
    "a layer that is itself shared": [0, 0, 1, 1],
    "a number below 0": [0, -1, 2, 2],
    "a truth value": [0, False, 2, 2],
    "a fraction": [0, 0.0, 2, 2],
    "text": "0022",
    "nothing": None,
    "a mapping": {"0": 0},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_map_that_no_version_writes_is_refused(packed, place, name):
    forge(place, packed, layers(WRONG[name]))
    with damaged("its manifest is damaged .*a map of layers"):
        read(place)


def test_layers_that_are_not_in_the_file_are_refused(packed, place):
    forge(place, packed, layers([0, 0, 2, 2], "decoder.layers"))
    with damaged(r"layer decoder\.layers\.\d: is in use, and not in the file"):
        read(place)
    forge(place, packed, layers([0, 1, 2, 2]))
    with damaged(r"layer layers\.1: is in use, and not in the file"):
        read(place)


def test_a_map_that_stands_for_much_memory_is_refused(packed, place):
    forge(place, packed, layers([0, 0, 2, *[2] * 200_000]))
    with damaged("layers in use stand for"):
        read(place)


def test_a_map_of_another_depth_does_not_load(packed, place):
    write(packed, place)
    with refuses("layers: the network does not have these 4 layers"):
        load(place, into=net(2))
    with refuses("layers: the network does not have these 4 layers"):
        load(place, into=nn.Linear(2, 2))


def test_every_use_has_its_tensors_in_the_state(packed, place):
    write(packed, place)
    state = read(place).state_dict()
    assert state.keys() == share_layers_(net(), 2).state_dict().keys()
    assert state["layers.3.fc.weight"] is state["layers.2.fc.weight"]
