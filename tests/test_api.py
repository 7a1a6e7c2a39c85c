"""The package in four functions, for any nn.Module."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from toys import INT_PLANS, TOKENS, WITHOUT_FAIRSEQ, ZOO_PLAN, hits, quiet, refuses, zoo

from fairseq_quant_noise import Plan, attach_noise, detach_noise, load, quantize_, save
from fairseq_quant_noise.artifact import pack, read
from fairseq_quant_noise.artifact.manifest import Manifest
from fairseq_quant_noise.artifact.packed import Packed
from fairseq_quant_noise.artifact.writer import serialize
from fairseq_quant_noise.errors import DamagedFileError
from fairseq_quant_noise.networks.registry import build

ROOT = Path(__file__).parents[1]
NOISE = {"noise": [{"match": ".*", "p": 0.5, "block_size": 1}]}
LM = {"decoder_layers": 1, "decoder_embed_dim": 16, "decoder_ffn_embed_dim": 32, "decoder_attention_heads": 2}
LM |= {"share_decoder_input_output_embed": True}
LM_PLAN = {"stages": [{"match": ".*", "block_size": 8}]}
STORY = """
import torch
from torch import nn
from fairseq_quant_noise import attach_noise, detach_noise, load, quantize_, save

def network():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))

plan = {"noise": [{"match": "[02]", "p": 0.2, "block_size": 4}], "stages": [{"match": "[02]", "block_size": 4}]}
model, x = network(), torch.randn(16, 8)
assert attach_noise(model, plan) is model
for _ in range(3):
    model(x).square().sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.01 * p.grad
            p.grad = None
detach_noise(model)
assert quantize_(model, plan) is model
size = save(model, sys.argv[1], plan)
assert size == __import__("os").path.getsize(sys.argv[1])
loaded = load(sys.argv[1], into=network())
assert not loaded.training
assert torch.equal(loaded(x), model.eval()(x))
assert not any(name.partition(".")[0] == "fairseq" for name in sys.modules)
print("done")
"""


def test_the_four_functions_serve_a_plain_module_where_fairseq_is_not_installed(tmp_path):
    command = [sys.executable, "-c", WITHOUT_FAIRSEQ + STORY, str(tmp_path / "model.safetensors")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr


def quantized_lm():
    torch.manual_seed(0)
    return quantize_(build("quant_noise_transformer_lm", LM, 40), LM_PLAN, progress=quiet).eval()


def lm_config(**changes):
    config = {"architecture": "quant_noise_transformer_lm", "cfg": {"model": LM}, "vocab_size": 40, "padding_idx": 1}
    return config | changes


@pytest.fixture
def place(tmp_path):
    return tmp_path / "model.safetensors"


# Noise


def test_attach_noise_gives_the_same_model_with_noise():
    model = zoo().train()
    clean = model(TOKENS)
    assert attach_noise(model, NOISE) is model
    assert not torch.equal(model(TOKENS), clean)
    detach_noise(model)
    assert torch.equal(model(TOKENS), clean)


def test_a_plan_without_noise_is_refused():
    with refuses("the plan has no noise rules; add a 'noise' section"):
        attach_noise(zoo(), ZOO_PLAN)


def test_noise_then_quantization_then_the_file_is_one_way_through(place):
    plan = Plan.of(NOISE | ZOO_PLAN)
    model = quantize_(attach_noise(zoo(), plan), plan, progress=quiet)
    save(model, place, plan)
    assert torch.equal(load(place, into=zoo(1))(TOKENS), model.eval()(TOKENS))
    assert Plan.of(read(place).manifest.plan) == plan


# Saving and loading


def test_a_language_model_loads_without_a_network(place):
    model = quantized_lm()
    save(model, place, LM_PLAN, lm_config())
    loaded = load(place)
    assert not loaded.training
    assert torch.equal(loaded(TOKENS), model(TOKENS))


@pytest.mark.parametrize("name", ["int8", "int4 by channel", "int3 by histogram", "mixed"])
def test_codes_of_n_bits_go_through_the_file_unchanged(place, name):
    model = quantize_(zoo(), INT_PLANS[name], progress=quiet).eval()
    save(model, place, INT_PLANS[name])
    loaded = load(place, into=zoo(1))
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert loaded.out._modules["weight"] is loaded.emb._modules["weight"]
    save(loaded, place.with_name("again"), INT_PLANS[name])
    assert place.with_name("again").read_bytes() == place.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("plan", [ZOO_PLAN, INT_PLANS["int8"]], ids=["pq", "int8"])
def test_a_half_model_goes_through_the_file_into_a_half_network(place, plan, dtype):
    model = quantize_(zoo().to(dtype), plan, progress=quiet).eval()
    save(model, place)
    loaded = load(place, into=zoo(1).to(dtype))
    assert loaded.fc.weight.dtype == dtype
    assert torch.equal(loaded(TOKENS), model(TOKENS))


INT8_INPUTS = {"stages": [{"match": ".*", "scheme": "int8", "range": "channel"}], "activations": {}}


def test_a_language_model_in_n_bits_with_rounded_inputs_loads_without_a_network(place):
    torch.manual_seed(0)
    lm = build("quant_noise_transformer_lm", LM, 40)
    model = quantize_(lm, INT8_INPUTS, calibration=[TOKENS], progress=quiet).eval()
    save(model, place, INT8_INPUTS, lm_config())
    assert torch.equal(load(place)(TOKENS), model(TOKENS))


@pytest.mark.parametrize("plan", [LM_PLAN, INT8_INPUTS], ids=["pq", "int8"])
def test_a_model_loaded_without_a_network_can_be_moved_and_copied(place, plan):
    model = quantize_(build("quant_noise_transformer_lm", LM, 40), plan, calibration=[TOKENS], progress=quiet)
    save(model, place, plan, lm_config())
    loaded = load(place)
    assert torch.equal(copy.deepcopy(loaded).to("cpu")(TOKENS), loaded(TOKENS))
    assert loaded.to("cpu", torch.float64)(TOKENS).dtype == torch.float64


def test_a_dense_model_goes_through_the_file_unchanged(place):
    save(zoo(), place)
    loaded = load(place, into=zoo(1))
    assert all(torch.equal(t, zoo().state_dict()[name]) for name, t in loaded.state_dict().items())
    assert loaded.out.weight is loaded.emb.weight


def test_ties_of_the_network_are_ties_after_loading(place):
    save(quantize_(zoo(), ZOO_PLAN, progress=quiet), place)
    loaded = load(place, into=zoo(1))
    assert loaded.out._modules["weight"] is loaded.emb._modules["weight"]


def test_a_loaded_model_can_be_fine_tuned(place):
    save(quantize_(zoo(), ZOO_PLAN, progress=quiet), place)
    loaded = load(place, into=zoo(1)).train()
    loaded(TOKENS).sum().backward()
    assert loaded.fc._modules["weight"].centroids.grad.any()


def test_a_loaded_model_can_be_saved_again_to_the_same_bytes(place, tmp_path):
    save(quantize_(zoo(), ZOO_PLAN, progress=quiet), place, ZOO_PLAN)
    save(load(place, into=zoo(1)), tmp_path / "again", ZOO_PLAN)
    assert (tmp_path / "again").read_bytes() == place.read_bytes()


def test_a_model_with_noise_is_saved_without_it(place):
    model = zoo().train()
    save(attach_noise(model, NOISE), place)
    assert not hits(read(place).tensors["fc.weight"], 1).any()
    assert torch.equal(load(place, into=zoo(1))(TOKENS), zoo().eval()(TOKENS))


def test_a_network_of_ones_own_is_asked_for(place):
    save(zoo(), place)
    with refuses(r"holds a network of your own; build it and call load\(path, into=network\)"):
        load(place)


class Smaller(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)


OTHERS = {
    "lacks modules": Smaller(),
    "of other sizes": type(zoo())(words=17),
    "of other widths": type(zoo())(dim=16),
}


@pytest.mark.parametrize("plan", [ZOO_PLAN, INT_PLANS["int8"], None], ids=["pq", "int8", "dense"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_network_that_does_not_fit_is_refused_in_one_line(place, name, plan):
    save(quantize_(zoo(), plan, progress=quiet) if plan else zoo(), place)
    with refuses("fit"):
        load(place, into=copy.deepcopy(OTHERS[name]))


def test_a_network_of_another_kind_is_refused_with_the_cure(place):
    save(zoo(), place, config=lm_config(architecture="quant_noise_unknown"))
    with refuses("model 'quant_noise_unknown' is not implemented without fairseq"):
        load(place)


def test_a_missing_file_is_the_users_mistake(tmp_path):
    with refuses("give the path of a packed file") as caught:
        load(tmp_path / "none")
    assert caught.value.exit_code == 2


HOSTILE = {
    "no configuration": {"architecture": "transformer_lm"},
    "a configuration that is a list": lm_config(cfg=[]),
    "model options that are a number": lm_config(cfg={"model": 5}),
    "an architecture that is a number": lm_config(architecture=5),
    "a vocabulary that is a word": lm_config(vocab_size="many"),
    "a layer count that is a word": lm_config(cfg={"model": LM | {"decoder_layers": "all"}}),
    "no heads": lm_config(cfg={"model": LM | {"decoder_attention_heads": 0}}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_describes_no_network_is_refused_as_damaged(place, name):
    """Such a file's hash is right: nobody needs a secret to compute it."""
    tensors = pack(quantized_lm(), config=lm_config())
    manifest = tensors.manifest
    forged = Manifest(manifest.producer, HOSTILE[name], {}, manifest.tensors, manifest.ties)
    place.write_bytes(serialize(Packed(tensors.tensors, forged)))
    with pytest.raises(DamagedFileError) as caught:
        load(place)
    assert "\n" not in str(caught.value)
