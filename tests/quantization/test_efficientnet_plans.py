"""The shipped plans for EfficientNet: their sizes, without memory for weights; and files that classify."""

import copy
import math
from pathlib import Path

import pytest
import torch
from efficientnet_stages import STAGES
from toys import quiet

from fairseq_quant_noise import load, quantize_, save
from fairseq_quant_noise.accounting import MIB
from fairseq_quant_noise.layers import quantized_weights
from fairseq_quant_noise.networks import EfficientNet, EfficientNetConfig
from fairseq_quant_noise.networks.registry import build
from fairseq_quant_noise.noise import attach_rules, detach_noise, fitted_rules, noise_of
from fairseq_quant_noise.noise.statistics import EVERY, FIRST
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.plan.rules import NoiseRule
from fairseq_quant_noise.quantization.table import make_table
from fairseq_quant_noise.quantization.targets import resolve_stages
from fairseq_quant_noise.weights.blocks import divides

PLANS = Path(__file__).parents[2] / "configs/plans"
TINY = {"_name": "quant_noise_efficientnet", "num_classes": 6, "width": 0.1, "depth": 0.6, "drop_path": 0.0}
SMALL = {"_name": "quant_noise_efficientnet", "num_classes": 10, "width": 0.35, "depth": 0.5}


@pytest.fixture(scope="module")
def b3():
    with torch.device("meta"):
        return EfficientNet(EfficientNetConfig(width=1.2, depth=1.4))


def table(model, name):
    return make_table(model, resolve_stages(Plan.of(PLANS / f"{name}.yaml"), model))


@pytest.mark.parametrize(("plan", "most"), [("efficientnet_b3", 3.4), ("efficientnet_b3_int8", 3.1)])
def test_the_papers_network_and_its_files_are_as_small_as_the_papers(b3, plan, most):
    found = table(b3, plan)
    assert found.parameters == 12_233_232
    assert round(found.dense_bytes / MIB, 2) == 46.67
    rows = {row.name.removesuffix(".weight"): row for row in found.rows}
    assert all(row.scheme == "pq" for name, row in rows.items() if len(row.shape) > 1), "every product is quantized"
    statistics = 4 * sum(buffer.numel() for buffer in b3.buffers())
    codes_to_bytes = sum(  # a code takes whole bits in the file
        math.prod(r.shape) // r.block_size * (math.ceil(math.log2(r.n_centroids)) - math.log2(r.n_centroids)) / 8
        for r in found.rows
        if r.scheme == "pq"
    )
    header = 100_000  # 94,720 bytes where it was written
    assert (found.paper_bytes + statistics + codes_to_bytes + header) / MIB < most


def test_the_plans_blocks_are_the_papers_where_size_allows(b3):
    size = {row.name: row.block_size for row in table(b3, "efficientnet_b3").rows}
    assert size["blocks.3.layers.0.conv_pw.weight"] == 4
    assert size["blocks.3.layers.0.conv_dw.weight"] == 9
    assert size["blocks.4.layers.0.conv_dw.weight"] == 5
    assert Plan.of(PLANS / "efficientnet_b3.yaml").stages[-1].match == "classifier"


@pytest.mark.parametrize(
    "plan",
    ["efficientnet_small", "efficientnet_lite", "efficientnet_lite_int8", "efficientnet_int4", "efficientnet_int8"],
)
def test_the_other_plans_fit_the_small_network(plan):
    model = build("quant_noise_efficientnet", SMALL, 0)
    found = table(model, plan)
    assert found.parameters == 335_594
    assert found.paper_bytes < found.dense_bytes / 3.9


def trained_enough(seed=0):
    """A network whose running statistics are of some images."""
    torch.manual_seed(seed)
    model = build("quant_noise_efficientnet", TINY, 0)
    for _ in range(3):
        model(torch.randn(8, 3, 32, 32))
    return model.eval()


PLANS_FOR_TINY = {
    "pq": {"stages": STAGES},
    "pq, int8 centroids": {"stages": STAGES, "centroids": {"dtype": "int8"}},
    "int4": {"stages": [{"match": ".*", "scheme": "int4", "range": "channel"}]},
    "int8, inputs too": {"stages": [{"match": ".*", "scheme": "int8"}], "activations": {"bits": 8}},
}


@pytest.mark.parametrize("plan", PLANS_FOR_TINY)
def test_a_file_classifies_as_the_quantized_network_does_and_keeps_the_statistics(plan, tmp_path):
    model, images = trained_enough(), torch.randn(4, 3, 32, 32)
    quantize_(model, PLANS_FOR_TINY[plan], calibration=[images])
    mean, variance = model.bn2.running_mean.clone(), model.bn2.running_var.clone()
    config = {"architecture": "quant_noise_efficientnet", "cfg": {"model": TINY}, "vocab_size": 0, "padding_idx": 1}
    save(model, tmp_path / "m.safetensors", config=config)
    back = load(tmp_path / "m.safetensors")
    assert torch.equal(back.bn2.running_mean, mean)
    assert torch.equal(back.bn2.running_var, variance)
    assert mean.abs().sum() > 0
    torch.testing.assert_close(back(images), model(images), atol=2e-3, rtol=2e-3)


def test_the_flags_noise_takes_the_papers_blocks_for_each_kind_of_convolution():
    model = build("quant_noise_efficientnet", {**TINY, "width": 1.0}, 0)
    rules = fitted_rules(model, [NoiseRule(".*", 0.1, "proxy", 4)])
    attach_rules(model, rules)
    size = {name: noise.rules[0].rule.d for name, noise in noise_of(model).weights.items()}
    assert len(size) == sum(p.dim() > 1 for p in model.parameters())
    assert all(divides(model.get_submodule(name)._parameters["weight"].shape, d) for name, d in size.items())
    assert size["blocks.1.first.conv_pw"] == size["classifier"] == 4
    assert size["blocks.1.first.conv_dw"] == size["conv_stem"] == 9
    assert size["blocks.2.first.conv_dw"] == 5
    assert size["blocks.2.first.se.conv_expand"] == 3  # of 6 inputs


def test_noise_changes_training_and_neither_weights_nor_evaluation():
    model, images = trained_enough(), torch.randn(4, 3, 32, 32)
    before, clean = {n: p.clone() for n, p in model.named_parameters()}, model(images)
    attach_rules(model, fitted_rules(model, [NoiseRule(".*", 0.3, "proxy", 4)]))
    assert torch.equal(model(images), clean)
    model.train()
    (model(images).sum()).backward()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_running_statistics_under_noise_are_those_of_the_weights_without_it():
    """Those of noised forwards, which evaluation does not see, took the loss in validation from 3 bits to hundreds."""
    torch.manual_seed(0)
    model = build("quant_noise_efficientnet", {**TINY, "dropout": 0.0}, 0)
    clean = copy.deepcopy(model)
    attach_rules(model, fitted_rules(model, [NoiseRule(".*", 0.3, "proxy", 4)]))
    for step in range(1, FIRST + EVERY + 2):
        images = torch.randn(4, 3, 32, 32)
        model(images).sum().backward()
        if step <= FIRST or step % EVERY == 0:
            clean(images)
    statistics = dict(clean.named_buffers())
    assert all(torch.equal(t, statistics[n]) for n, t in model.named_buffers() if "running" in n)
    assert model.bn2.momentum == 0.1
    detach_noise(model)
    model(images)
    assert not torch.equal(model.bn2.running_mean, statistics["bn2.running_mean"])


def test_a_network_without_convolutions_keeps_the_size_that_is_given():
    rules = [NoiseRule(".*", 0.1, "proxy", 8)]
    assert fitted_rules(torch.nn.Linear(12, 2), rules) == rules


@pytest.mark.upstream(35)
def test_each_centroid_of_a_depthwise_layer_is_used():
    """Also where K asks for more than the layer's few blocks can feed, and half of them are equal."""
    torch.manual_seed(0)
    model = build("quant_noise_efficientnet", SMALL, 0)
    depthwise = [name for name, part in model.named_modules() if name.endswith("conv_dw")]
    for name in depthwise:
        weight = model.get_submodule(name).weight.data
        weight[: len(weight) // 2] = 0
    size = {r"blocks\.[0136]\..*": 9, "default": 5}
    quantize_(model, {"stages": [{"match": r".*\.conv_dw", "block_size": size, "n_centroids": 256}]}, progress=quiet)
    found = quantized_weights(model)
    assert list(found) == depthwise
    for weight in found.values():
        assert len(weight.codes.unique()) == len(weight.centroids) <= max(1, weight.codes.numel() // 4)
