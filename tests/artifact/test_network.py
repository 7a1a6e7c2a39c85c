"""A packed file against the network that it describes, before anything is loaded."""

from dataclasses import replace

import pytest
from toys import refuses

from fairseq_quant_noise.artifact import network as module
from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.artifact.network import check_network
from fairseq_quant_noise.artifact.packed import Packed
from fairseq_quant_noise.plugin.loading import load_state


def changed(packed, options=None, tensors=None, **manifest):
    """The packed file with other options of the model, tensors or entries in its manifest."""
    model = packed.manifest.model
    cfg = {**model["cfg"], "model": {**model["cfg"]["model"], **(options or {})}}
    manifest = replace(packed.manifest, model={**model, "cfg": cfg}, **manifest)
    return Packed(packed.tensors if tensors is None else tensors, manifest)


@pytest.fixture(scope="module")
def packed(runs):
    return read(runs.packed("plain"))


def test_fairseq_loads_a_file_without_a_second_network_of_it(runs, monkeypatch):
    """The check needs names and shapes alone; fairseq makes the network, and it alone loads the weights."""
    built = []
    build = module._build
    monkeypatch.setattr(module, "_build", lambda *args: built.append(build(*args)) or built[-1])
    assert load_state(runs.packed("plain"))["model"]
    (network,) = built
    assert all(tensor.is_meta for tensor in network.state_dict().values())


def test_a_file_of_other_sizes_than_it_describes_is_refused_by_name(packed):
    check_network("x", packed)
    bias = "decoder.layers.0.fc1.bias"
    with refuses(rf"^x: does not fit this network \({bias}: of shape \(64,\) in the file, of shape \(16384,\) in the"):
        check_network("x", changed(packed, {"decoder_ffn_embed_dim": 1 << 14}))
    with refuses(
        r"^x: does not fit this network \(.*: not in the file, of shape .* in the network that it describes\)"
    ):
        check_network("x", changed(packed, {"decoder_layers": 3}))
    with refuses(rf"\({bias}: not in the file"):
        check_network("x", changed(packed, tensors={n: t for n, t in packed.tensors.items() if n != bias}))


def test_an_input_of_no_module_is_refused_by_name(packed):
    with refuses(r"\(decoder\.nowhere: rounds its input, and is not in the network\)"):
        check_network("x", changed(packed, inputs={"decoder.nowhere": {"bits": 8, "low": 0.0, "high": 1.0}}))
