"""Every layer of torch that has a weight: noised, quantized, saved and loaded, along its inputs."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from toys import refuses

from fairseq_quant_noise import attach_noise, detach_noise, load, noise_of, quantize_, save
from fairseq_quant_noise.artifact import dense_state, read
from fairseq_quant_noise.layers import adopt_quantized
from fairseq_quant_noise.weights.discovery import find_weights, uncovered


class Of(nn.Module):
    """One layer, called on `inputs`."""

    def __init__(self, layer, *inputs):
        super().__init__()
        self.layer, self.inputs = layer, inputs

    def forward(self):
        """The first output."""
        output = self.layer(*self.inputs)
        return output[0] if isinstance(output, tuple) else output


class Conv1D(nn.Module):
    """As that of transformers, which is no dependency: a Linear that stores (I, O)."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(x.size()[:-1] + (self.nf,))


def weight_normed(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


X, IMAGE, VOLUME = torch.randn(3, 5, 8), torch.randn(2, 8, 6, 6), torch.randn(2, 8, 3, 3, 3)
#: By name: the model, d, and the weights' names.
LAYERS = {
    "MultiheadAttention": (lambda: Of(nn.MultiheadAttention(8, 2), X, X, X), 4, ["in_proj_weight", "out_proj"]),
    "MultiheadAttention of three widths": (
        lambda: Of(nn.MultiheadAttention(8, 2, kdim=4, vdim=8), X, X[..., :4], X),
        4,
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"],
    ),
    "Conv1d": (lambda: Of(nn.Conv1d(5, 4, 3), X), 3, [""]),
    "Conv1d in groups": (lambda: Of(nn.Conv1d(5, 5, 3, groups=5), X), 3, [""]),
    "Conv3d": (lambda: Of(nn.Conv3d(8, 4, 2), VOLUME), 8, [""]),
    "ConvTranspose1d": (lambda: Of(nn.ConvTranspose1d(5, 4, 1), X), 5, [""]),
    "ConvTranspose2d": (lambda: Of(nn.ConvTranspose2d(8, 4, 2), IMAGE), 8, [""]),
    "EmbeddingBag": (lambda: Of(nn.EmbeddingBag(20, 8), torch.arange(12).view(4, 3)), 4, [""]),
    "Bilinear": (lambda: Of(nn.Bilinear(8, 8, 3), X, X), 4, [""]),
    "LSTM": (
        lambda: Of(nn.LSTM(8, 8, num_layers=2, proj_size=4), X),
        4,
        [f"weight_{kind}_l{i}" for i in (0, 1) for kind in ("ih", "hh", "hr")],
    ),
    "GRU in both directions": (
        lambda: Of(nn.GRU(8, 8, bidirectional=True), X),
        4,
        ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"],
    ),
    "LSTMCell": (lambda: Of(nn.LSTMCell(8, 8), X[0]), 4, ["weight_ih", "weight_hh"]),
    "Conv1D": (lambda: Of(Conv1D(3, 8), X), 4, [""]),
    "weight norm": (lambda: Of(weight_normed(nn.Linear(8, 4)), X), 4, ["weight_v"]),
    "weight norm as a parametrization": (
        lambda: Of(nn.utils.parametrizations.weight_norm(nn.Conv1d(5, 4, 3)), X),
        3,
        ["parametrizations.weight.original1"],
    ),
    "spectral norm": (
        lambda: Of(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4)), X),
        4,
        ["parametrizations.weight.original"],
    ),
}
ALL = pytest.mark.parametrize("name", LAYERS)


def build(name, seed=0):
    torch.manual_seed(seed)
    return LAYERS[name][0]()


def noise(model, d, **rule):
    return attach_noise(model, {"noise": [{"match": ".*", "p": 1.0, "block_size": d, **rule}]}).train()


@ALL
def test_each_weight_is_found_by_name_and_none_is_passed_over(name):
    model = build(name)
    assert [w.name for w in find_weights(model)] == [".".join(filter(None, ("layer", n))) for n in LAYERS[name][2]]
    assert not uncovered(model)


@ALL
@pytest.mark.parametrize("kind", ["proxy", "int4"])
def test_a_training_forward_sees_noise_and_the_store_none(name, kind):
    model, d = build(name), LAYERS[name][1]
    model.train()
    state = {key: p.detach().clone() for key, p in model.named_parameters()}
    torch.manual_seed(1)
    clean = model().detach()
    noise(model, d, kind=kind, p=0.5)
    torch.manual_seed(1)
    seen = model()
    assert not torch.allclose(seen, clean)
    seen.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    after = dict(model.named_parameters())
    assert list(after) == list(state)
    assert all(torch.equal(after[key], value) for key, value in state.items())
    detach_noise(model)
    assert type(model.layer) is type(build(name).layer) or "Parametrized" in type(model.layer).__name__


@pytest.mark.usefixtures("fp32_products")
@ALL
@pytest.mark.parametrize("stage", [{}, {"scheme": "int4", "range": "channel"}], ids=["pq", "int4"])
def test_a_file_gives_the_quantized_layer_back(name, stage, tmp_path):
    model, d = build(name), LAYERS[name][1]
    dense = model.eval()().detach()
    quantize_(model, {"stages": [{"match": ".*", "block_size": d, "n_centroids": 16, **stage}]}, progress=str)
    assert all(isinstance(w.stored, nn.Module) for w in find_weights(model))
    with torch.no_grad():
        expected = model.eval()()
    assert not torch.equal(expected, dense)
    save(model, tmp_path / "m.safetensors")
    back = load(tmp_path / "m.safetensors", into=build(name, seed=1))
    with torch.no_grad():
        assert torch.equal(back(), expected)
    model.train()().square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


TURNED = ["ConvTranspose1d", "ConvTranspose2d", "Conv1D"]


@pytest.mark.parametrize("name", TURNED)
def test_blocks_of_weights_with_the_inputs_first_run_along_the_inputs(name, tmp_path):
    model, d = build(name), LAYERS[name][1]
    weight = model.layer.weight.detach()
    (found,) = find_weights(model)
    assert torch.equal(found.stored, weight.transpose(0, 1))
    torch.manual_seed(0)
    noise(model, d, kind="mean")
    seen = []
    model.layer.register_forward_pre_hook(lambda layer, inputs: seen.append(layer.weight.detach()))
    model()
    means = weight.transpose(0, 1).reshape(-1, d).mean(1)
    assert torch.allclose(seen[0].transpose(0, 1).reshape(-1, d).mean(1), means, atol=1e-6)
    assert (seen[0].transpose(0, 1).reshape(-1, d).std(1) < 1e-6).all()
    detach_noise(model)
    quantize_(model, {"stages": [{"match": ".*", "block_size": d}]}, progress=str)
    save(model, tmp_path / "m.safetensors")
    packed = read(tmp_path / "m.safetensors")
    assert packed.manifest.format_version == 5
    assert packed.shapes()["layer.weight"] == tuple(weight.shape)


def test_a_channel_of_a_weight_with_the_inputs_first_is_an_output():
    model = Of(Conv1D(3, 8), X)
    model.layer.weight.data *= torch.tensor([1.0, 10.0, 100.0])
    quantize_(model, {"stages": [{"match": ".*", "scheme": "int8", "range": "channel"}]}, progress=str)
    (found,) = find_weights(model)
    assert found.stored.affine.shape == (2, 3)
    assert found.shape == (3, 8)
    state = model.state_dict()
    assert torch.equal(dense_state(state)["layer.weight"], model.eval().layer.weight)


@pytest.mark.parametrize("training", [True, False])
def test_attentions_fast_path_sees_the_codes(training):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = Of(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), X)
    quantize_(model, {"stages": [{"match": ".*", "block_size": 4, "n_centroids": 16}]}, progress=str)
    plain = Of(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), X)
    with torch.no_grad():
        model.train(training)
        plain.load_state_dict({w.tensor_name: w.turn(w.stored.decode()) for w in find_weights(model)}, strict=False)
        torch.testing.assert_close(model(), plain.train(training)(), atol=1e-4, rtol=1e-4)


@ALL
def test_a_noised_model_can_be_pickled_and_copied(name):
    model = noise(build(name), LAYERS[name][1], p=0.5)
    if name != "Conv1D" and "norm" not in name:  # a stand-in; torch's normalisations do not pickle by themselves
        assert [w.name for w in find_weights(pickle.loads(pickle.dumps(model)))] == [
            w.name for w in find_weights(model)
        ]
    if name != "weight norm":
        twin = copy.deepcopy(model)
        assert noise_of(twin) is not noise_of(model)
        assert not torch.equal(twin(), twin())


def test_a_block_size_that_does_not_fit_names_the_parameter():
    with refuses(r"^layer\.in_proj_weight: blocks of 3 do not divide a weight of shape \(24, 8\)"):
        noise(build("MultiheadAttention"), 3)


@pytest.mark.usefixtures("fp32_products")
@pytest.mark.parametrize("name", TURNED)
@pytest.mark.parametrize("how", ["codes", "scales"])
def test_codes_and_scales_that_train_are_for_weights_with_the_inputs_first_too(name, how, tmp_path):
    stage = (
        {"block_size": LAYERS[name][1], "n_centroids": 4}
        if how == "codes"
        else {"scheme": "int4", "range": "learned-channel"}
    )
    plan = {"stages": [{"match": ".*", **stage}]} | ({"codes": {"kind": "train"}} if how == "codes" else {})
    model = quantize_(build(name), plan, progress=str).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model().square().mean().backward()
        optimizer.step()
    twin = build(name, seed=1)
    adopt_quantized(twin, model.state_dict())
    twin.load_state_dict(model.state_dict())
    save(model, tmp_path / "m.safetensors")
    packed = load(tmp_path / "m.safetensors", into=build(name, seed=1))
    with torch.no_grad():
        expected = model.eval()()
        assert torch.equal(twin.eval()(), expected)
        torch.testing.assert_close(packed(), expected, atol=1e-5, rtol=1e-4)
