"""A network on a GPU: what it keeps, measures and loads is where its weights are (`fake_cuda.py`: no GPU is needed)."""

import copy
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import FakeCuda, fake_cuda, on_cuda, real
from torch import nn
from toys import INPUTS_PLAN, INT_PLANS, SHARED_PLAN, TOKENS, ZOO_PLAN, quiet, zoo

from fairseq_quant_noise import attach_noise, load, noise_of, quantize_, save, second_moments
from fairseq_quant_noise.layers import PQWeight, adopt_quantized, calibrating
from fairseq_quant_noise.layers.batch_statistics import estimating
from fairseq_quant_noise.layers.lookup import Lookup
from fairseq_quant_noise.noise import distortions
from fairseq_quant_noise.noise.measure import Probe
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.plugin.distillation import Recorder, distillation_loss
from fairseq_quant_noise.pq import encode
from fairseq_quant_noise.quantization.importance import sound
from fairseq_quant_noise.quantization.quantize import quantized_values, swapped
from fairseq_quant_noise.quantization.targets import resolve_stages
from fairseq_quant_noise.weights.discovery import find_weights

NOISES = {
    "proxy": {"kind": "proxy"},
    "mean": {"kind": "mean"},
    "pq": {"kind": "pq"},
    "pq, then int8": {"kind": ["pq", "int8"]},
    "clusters": {"kind": "proxy", "choice": "clusters"},
    **{f"int4 by {range_}": {"kind": "int4", "range": range_} for range_ in ("tensor", "channel", "histogram")},
}
QUANTIZED = {
    "pq": ZOO_PLAN,
    "a shared codebook": SHARED_PLAN,
    "a shared codebook in int8": SHARED_PLAN | {"centroids": {"dtype": "int8"}},
    **INT_PLANS,
    "inputs": INPUTS_PLAN,
}
kinds = pytest.mark.parametrize("kind", NOISES)
plans = pytest.mark.parametrize("plan", QUANTIZED.values(), ids=QUANTIZED)


@pytest.fixture(autouse=True)
def few_iterations(monkeypatch):
    """Of k-means, on both devices: each operation takes Python's time here."""
    monkeypatch.setattr(encode, "ITERATIONS", 1)
    monkeypatch.setattr(distortions, "FIRST_ITERATIONS", 1)
    monkeypatch.setattr(distortions, "NEXT_ITERATIONS", 1)


def cuda(anything):
    """A model, which is moved, or tensors."""
    return anything.to("cuda") if isinstance(anything, nn.Module) else on_cuda(anything)


class Classifier(nn.Module):
    """As fairseq's models: of images, three classes."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, images):
        return (self.conv(images).mean((2, 3)),)

    def get_targets(self, sample, output):
        return sample["target"]

    def get_normalized_probs(self, output, log_probs):
        return output[0].float().log_softmax(-1)


def noised(kind, p=1.0):
    model = zoo()
    rule = {"match": r"fc|emb|conv|attn\..*", "p": p, "block_size": 1, "n_centroids": 4, "refresh": 100}
    attach_noise(model, {"noise": [{**rule, **NOISES[kind]}]})
    return model.train()


def quantized(plan):
    return quantize_(zoo(), plan, calibration=[TOKENS], progress=quiet)


def assert_same(found, expected):
    """A tensor of the device, with the numbers of one of the CPU."""
    assert isinstance(found, FakeCuda)
    torch.testing.assert_close(real(found), expected)


def strangers(model):
    """What of the model has been left on the CPU."""
    return [name for name, tensor in model.state_dict().items() if not tensor.is_cuda]


# The device itself


def test_a_mix_of_devices_fails_and_one_device_computes():
    expected = zoo()(TOKENS)
    with fake_cuda():
        model = cuda(zoo())
        assert model.emb.weight is model.out.weight
        assert_same(model(cuda(TOKENS)), expected)
        with pytest.raises(RuntimeError, match="to be on the same device"):
            model(TOKENS)
        with pytest.raises(RuntimeError, match="to be on the same device"):
            cuda(torch.ones(2)) + torch.ones(2)


# Noise


@pytest.mark.parametrize(
    ("kind", "resumed"),
    [*product(NOISES, ["loaded on the GPU", "moved to the GPU"]), ("pq, then int8", "measured there")],
)
def test_noise_goes_on_with_what_it_measured(kind, resumed):
    """fairseq loads a checkpoint to the CPU, and so what the noise had measured."""
    before, after = noised(kind), noised(kind)
    before(TOKENS)
    state = copy.deepcopy(noise_of(before).state_dict())
    noise_of(before).set_num_updates(1)
    expected = before(TOKENS)
    with fake_cuda():
        if resumed == "loaded on the GPU":
            noise_of(cuda(after)).load_state_dict(state)
        elif resumed == "moved to the GPU":
            noise_of(after).load_state_dict(state)
            cuda(after)
        else:
            cuda(after)(cuda(TOKENS))
        noise_of(after).set_num_updates(1)
        fitted = [rule.fitted for noise in noise_of(after).weights.values() for rule in noise.rules]
        assert_same(after(cuda(TOKENS)), expected)
        assert fitted == [rule.fitted for noise in noise_of(after).weights.values() for rule in noise.rules]
        noise_of(after).set_num_updates(1000)
        after(cuda(TOKENS))


@kinds
def test_a_share_of_the_blocks_is_drawn_on_the_device(kind):
    source, model = noised(kind), noised(kind, 0.5)
    source(TOKENS)
    state = noise_of(source).state_dict()
    with fake_cuda():
        noise_of(cuda(model)).load_state_dict(state)
        assert isinstance(model(cuda(TOKENS)), FakeCuda)


def test_the_measurement_of_noise_runs_on_the_device():
    model, found = noised("proxy"), []
    with fake_cuda():
        Probe(cuda(model), found.append)
        model(cuda(TOKENS))
    assert found[0]["fc"].of_weight == 1.0


# Quantized weights


THERE = ("a shared codebook in int8", "mixed", "int3 by histogram", "inputs")  # k-means takes seconds here


@pytest.mark.usefixtures("fp32_products")
@pytest.mark.parametrize(
    ("name", "way"),
    [*product(QUANTIZED, ["moved", "loaded"]), *((name, "quantized there") for name in THERE)],
)
def test_quantized_weights_and_inputs_compute_on_the_device(name, way):
    plan = QUANTIZED[name]
    source = quantized(plan)
    with fake_cuda():
        if way == "moved":
            model = cuda(copy.deepcopy(source))
        elif way == "loaded":
            model, state = cuda(zoo(1)), source.state_dict()
            adopt_quantized(model, state)
            model.load_state_dict(state)
        else:
            model = quantize_(cuda(zoo()), plan, calibration=[cuda(TOKENS)], progress=quiet)
        assert strangers(model) == []
        assert_same(model.train()(cuda(TOKENS)).detach(), source.train()(TOKENS).detach())
        assert_same(model.eval()(cuda(TOKENS)).detach(), source.eval()(TOKENS).detach())
        with torch.no_grad():
            assert_same(model(cuda(TOKENS)), source(TOKENS))
        assert adopt_quantized(model, source.state_dict()) == []


@plans
def test_the_file_of_a_network_on_the_device_is_that_of_one_on_the_cpu(plan, tmp_path):
    source = quantized(plan)
    save(source, tmp_path / "expected")
    with fake_cuda():
        save(cuda(copy.deepcopy(source)), tmp_path / "found")
        assert_same(load(tmp_path / "found", into=cuda(zoo(1)))(cuda(TOKENS)).detach(), source.eval()(TOKENS).detach())
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize("bits", [16, 8])
def test_the_gradient_of_centroids_is_summed_on_the_device(bits):
    weight = PQWeight(torch.randint(4, (8, 6), dtype=torch.uint8), torch.randn(4, 2), (8, 12), bits).train()
    upstream = torch.randn(8, 12)
    weight.decode().backward(upstream)
    with fake_cuda():
        codes, count = cuda(weight.codes.flatten().long()), cuda(weight.count())
        context = SimpleNamespace(saved_tensors=(codes, count), n_centroids=4, latent_shape=None)
        gradient, *_ = Lookup.backward(context, cuda(upstream.view(-1, 2)))
        assert_same(gradient, weight.centroids.grad)


# What quantizes them


@pytest.mark.parametrize("plan", [SHARED_PLAN], ids=["a shared codebook"])
def test_moments_from_a_checkpoint_weigh_errors_on_the_device(plan):
    moments = {name: torch.rand_like(p) for name, p in zoo().named_parameters(remove_duplicate=False)}
    expected = quantize_(zoo(), plan, importance=moments, calibration=[TOKENS], progress=quiet)
    with fake_cuda():
        model = cuda(zoo())
        dense = {w.tensor_name: w.stored for w in find_weights(model)}
        given = sound(moments, dense)
        assert given.keys() == dense.keys()
        quantize_(model, plan, importance=given, calibration=[cuda(TOKENS)], progress=quiet)
        assert_same(model.eval()(cuda(TOKENS)).detach(), expected.eval()(TOKENS).detach())


def test_the_moments_of_an_optimizer_on_the_device():
    model = zoo()
    with fake_cuda():
        optimizer = torch.optim.Adam(cuda(model).parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moments = second_moments(model, optimizer)
        assert all(isinstance(tensor, FakeCuda) for tensor in moments.values())
        weights = {w.tensor_name: w.stored for w in find_weights(model)}
        kept = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in sound(moments, weights).items()}
        assert kept.keys() == weights.keys()


@pytest.mark.parametrize("plan", [INT_PLANS["mixed"]], ids=["mixed"])
def test_the_gap_is_measured_on_the_device(plan):
    with fake_cuda():
        model = cuda(zoo())
        before = model(cuda(TOKENS)).detach()
        values = quantized_values(resolve_stages(Plan.of(plan), model), seed=0, progress=quiet)
        with swapped(values):
            assert not torch.equal(real(model(cuda(TOKENS)).detach()), real(before))
        assert_same(model(cuda(TOKENS)).detach(), real(before))


def test_batch_statistics_are_estimated_on_the_device():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(5, 3, 8, 8)
    twin = copy.deepcopy(model)
    with estimating(model):
        model(x)
    with fake_cuda():
        with estimating(cuda(twin)):
            twin(cuda(x))
        assert_same(twin[1].running_var, model[1].running_var)


def test_ranges_of_inputs_are_calibrated_on_the_device():
    model, twin = quantized(INPUTS_PLAN), quantized(INPUTS_PLAN)
    other = TOKENS.flip(0, 1)
    with calibrating(model):
        model(other)
    with fake_cuda():
        with calibrating(cuda(twin)):
            twin(cuda(other))
        for name, tensor in model.state_dict().items():
            assert_same(twin.state_dict()[name], tensor)


# A teacher


@pytest.mark.parametrize("how", ["logits", "regression"])
def test_a_teacher_distils_on_the_device(how):
    student, teacher, sample = Classifier(0), Classifier(1).eval(), {"target": torch.tensor([0, 2])}
    x, regression = torch.randn(2, 3, 5, 5), how == "regression"

    def loss(recorder, teacher, sample, x):
        recorder(images=x)
        return distillation_loss(recorder, teacher, sample, -100, regression).detach()

    expected = loss(Recorder(student), teacher, sample, x)
    with fake_cuda():
        found = loss(Recorder(cuda(student)), cuda(teacher), cuda(sample), cuda(x))
        assert_same(found, expected)
