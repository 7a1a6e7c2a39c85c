"""docs/file_format.md is enough to read a packed file: the numpy reader in it gives what `load` gives."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from stacks import net
from torch import nn
from toys import INPUTS_PLAN, INT_PLANS, SHARED_PLAN, TOKENS, ZOO_PLAN, quiet, zoo
from wide import WIDE_PLAN, wide_net

from fairseq_quant_noise import load, quantize_, save, share_layers_
from fairseq_quant_noise.artifact.manifest import FORMAT_VERSION, Manifest, QuantizedTensor

SPEC = Path(__file__).parents[2] / "docs/file_format.md"
FEW = {"stages": [{"match": "fc|emb", "block_size": 4, "n_centroids": 3}]}
PLANS = {"pq": ZOO_PLAN, "pq of 3 centroids": FEW, "shared codebooks": SHARED_PLAN, "inputs": INPUTS_PLAN, **INT_PLANS}
PLANS["dense in fp16"] = ZOO_PLAN | {"dense": "fp16"}


@pytest.fixture(scope="module")
def read_packed():
    (block,) = re.findall(r"```python\n(.*?)```", SPEC.read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(block, str(SPEC), "exec"), names)
    imported = re.findall(r"^import (.+)$", block, re.MULTILINE)
    assert set(", ".join(imported).split(", ")) == {"hashlib", "json", "math", "re", "struct", "numpy as np"}
    return names["read_packed"]


def same_as(model, arrays):
    """Every tensor of `model`, as a forward reads it, is in `arrays` bit for bit; and nothing else is."""
    seen = {}
    for name, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        if "weight" in {*module._parameters, *module._modules}:
            tensors["weight"] = module.weight
        if name.rpartition(".")[2] not in ("weight", "input_quantizer"):
            seen |= {f"{name}.{key}".lstrip("."): tensor for key, tensor in tensors.items() if tensor is not None}
    assert set(seen) == set(arrays)
    for name, tensor in seen.items():
        assert np.array_equal(tensor.detach().numpy(), arrays[name]), name
    return seen


@pytest.mark.parametrize("name", PLANS)
def test_the_reader_of_the_specification_decodes_every_scheme(read_packed, tmp_path, name):
    model = quantize_(zoo(), PLANS[name], calibration=[TOKENS], progress=quiet)
    save(model, tmp_path / "model.safetensors", PLANS[name])
    with torch.no_grad():
        seen = same_as(load(tmp_path / "model.safetensors", into=zoo()), read_packed(tmp_path / "model.safetensors"))
    assert torch.equal(seen["out.weight"], seen["emb.weight"])  # the tie


def test_it_puts_shared_layers_where_they_are_used(read_packed, tmp_path):
    model = share_layers_(net(), 2)
    quantize_(model, {"stages": [{"match": r"layers\.\d+\.fc", "block_size": 4}]}, progress=quiet)
    save(model, tmp_path / "model.safetensors")
    arrays = read_packed(tmp_path / "model.safetensors")
    with torch.no_grad():
        same_as(load(tmp_path / "model.safetensors", into=net()), arrays)
    assert np.array_equal(arrays["layers.0.fc.weight"], arrays["layers.1.fc.weight"])
    assert not np.array_equal(arrays["layers.0.fc.weight"], arrays["layers.2.fc.weight"])


@pytest.mark.parametrize("stage", [{"block_size": 4}, {"scheme": "int4", "range": "channel"}], ids=["pq", "int4"])
def test_it_turns_a_tensor_that_is_stored_transposed(read_packed, tmp_path, stage):
    model = quantize_(nn.ConvTranspose2d(4, 6, 2), {"stages": [{"match": "", **stage}]}, progress=quiet)
    save(model, tmp_path / "model.safetensors")
    arrays = read_packed(tmp_path / "model.safetensors")
    assert arrays["weight"].shape == (4, 6, 2, 2)
    with torch.no_grad():
        back = load(tmp_path / "model.safetensors", into=nn.ConvTranspose2d(4, 6, 2))
        assert np.array_equal(back.weight.numpy(), arrays["weight"])


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_it_reads_codes_of_more_than_8_bits(read_packed, tmp_path, dtype):
    model = quantize_(wide_net(), WIDE_PLAN | {"centroids": {"dtype": dtype}}, progress=quiet)
    save(model, tmp_path / "model.safetensors")
    with torch.no_grad():
        same_as(load(tmp_path / "model.safetensors", into=wide_net()), read_packed(tmp_path / "model.safetensors"))


def test_it_refuses_a_file_that_lost_a_bit(read_packed, tmp_path):
    path = tmp_path / "model.safetensors"
    save(zoo(), path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        read_packed(path)


def test_the_specification_is_of_this_version_and_names_every_key():
    text = SPEC.read_text()
    assert text.startswith(f"# The packed file, format version {FORMAT_VERSION}\n")
    for cls in (Manifest, QuantizedTensor):
        assert [key for key in cls.__dataclass_fields__ if f"| `{key}` |" not in text] == []
