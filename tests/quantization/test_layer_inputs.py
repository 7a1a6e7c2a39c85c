"""`encode: feedback`: the layers' inputs, measured; weights, encoded by their outputs' errors."""

import contextlib

import pytest
import torch
from torch import nn
from toys import Attention, Tied, quiet, refuses

from fairseq_quant_noise import load, quantize_, save
from fairseq_quant_noise.layers import quantized_weights
from fairseq_quant_noise.quantization.feedback import measuring_inputs
from fairseq_quant_noise.quantization.quantize import quantized_state

PLAN = {"stages": [{"match": ".*", "block_size": 4, "n_centroids": 8}], "encode": "feedback"}
PLAIN = PLAN | {"encode": "plain"}
KINDS = ("plain", "feedback")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))


def inputs(seed=1, n=256):
    """Correlated ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 16, generator=generator) @ torch.randn(16, 16, generator=torch.Generator().manual_seed(9))


def quantized(model, plan=PLAN, **settings):
    return quantize_(model, plan, **{"calibration": [inputs()], "progress": quiet} | settings).eval()


def error(model, x):
    """Of the first layer's outputs."""
    with torch.no_grad():
        return float((model[0](x) - network()[0](x)).square().sum())


def test_a_layers_outputs_are_nearer_than_by_k_means_on_other_inputs_too():
    fresh = inputs(2)
    assert error(quantized(network()), fresh) < 0.7 * error(quantized(network(), PLAIN), fresh)


def test_measured_are_the_second_moments_over_all_inputs():
    model, batches = network().train(), [inputs(3, 10), inputs(4, 20)]
    with measuring_inputs(model, ["0", "2"]) as found:
        for batch in batches:
            model(batch)
        assert not model.training
    x = torch.cat(batches)
    hidden = model[1](model[0](x)).detach()
    torch.testing.assert_close(found["0.weight"], x.t() @ x / 30)
    torch.testing.assert_close(found["2.weight"], hidden.t() @ hidden / 30)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


CONVOLUTIONS = {
    "grouped, strided": (nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), (3, 6, 9, 11)),
    "depthwise, dilated": (nn.Conv2d(4, 4, 5, padding="same", dilation=(1, 2), groups=4), (2, 4, 8, 9)),
    "without padding": (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 5)),
    "1x1": (nn.Conv2d(4, 6, 1, stride=2), (2, 4, 7, 5)),
    "one dimension": (nn.Conv1d(4, 5, 3, stride=2, padding=2), (2, 4, 12)),
    "reflected": (nn.Conv2d(4, 6, (1, 3), padding=(0, 1), padding_mode="reflect"), (2, 4, 5, 6)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_moments_of_a_convolution_are_those_of_what_its_kernels_see(name):
    """The mean square of its outputs without bias, of each group, is w M w^T with the mean moments of the groups."""
    module, shape = CONVOLUTIONS[name]
    torch.manual_seed(3)
    x = torch.randn(shape)
    kernel = torch.randn(module.weight[0].shape)
    with torch.no_grad():
        module.weight.copy_(kernel.expand_as(module.weight))  # all rows alike: then each output sees the mean of groups
        module.bias.zero_()
        squares = module(x).square().mean()
    with measuring_inputs(nn.Sequential(module), ["0"]) as found:
        module(x)
    flat = kernel.flatten()
    torch.testing.assert_close(flat @ found["0.weight"] @ flat, squares)


def normed(groups):
    torch.manual_seed(7)
    first, norm = nn.Conv2d(4, 8, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(8)
    return nn.Sequential(first, norm, nn.ReLU(), nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize("groups", [1, 4])
def test_what_batch_normalisation_takes_away_costs_nothing(groups):
    """An error of the kernel costs the variance of what it adds to an output, not its square."""
    model, x = normed(groups), torch.rand(6, 4, 8, 8) + torch.arange(4.0).view(4, 1, 1)
    error = torch.randn(model[0].weight[0].shape)
    with measuring_inputs(model, ["0", "3"]) as found:
        model(x)
    added = nn.functional.conv2d(x, error.expand_as(model[0].weight), padding=1, groups=groups)  # (6, 8, 8, 8)
    expected = added.transpose(0, 1).flatten(1).var(1, correction=0).mean()
    torch.testing.assert_close(error.flatten() @ found["0.weight"] @ error.flatten(), expected)
    hidden = model.eval()[:3](x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found["3.weight"], (hidden @ hidden.t() / hidden.shape[1]).detach())


def test_large_means_and_channels_that_stay_the_same_do_no_harm():
    """In float32 a mean of 3,000 hides a variance of 1; a constant channel has no correlations at all."""
    model, x = normed(1), torch.randn(6, 4, 8, 8) + 3000.0
    x[:, 1] = 5000.0
    model[0].padding = (0, 0)
    with measuring_inputs(model, ["0"]) as found:
        model(x)
    windows = nn.functional.unfold(x.double(), 3).transpose(1, 2).flatten(0, 1)  # (places, I)
    expected = torch.cov(windows.t(), correction=0)
    torch.testing.assert_close(found["0.weight"], expected.float(), rtol=1e-3, atol=1e-3)
    plan = {"stages": [{"match": "0", "block_size": 9, "n_centroids": 4}], "encode": "feedback"}
    lines = []
    quantize_(model, plan, inputs=found, progress=lines.append)
    assert any("error feedback" in line for line in lines)


def test_inputs_that_never_change_before_batch_normalisation_are_left_out():
    model = normed(1)
    model[0].padding = (0, 0)
    with measuring_inputs(model, ["0"]) as found:
        model(torch.full((3, 4, 9, 9), 0.1))
    assert not found


def test_a_layer_that_only_sometimes_meets_batch_normalisation_keeps_its_means():
    model, x = normed(1), torch.rand(6, 4, 8, 8)
    with measuring_inputs(model, ["0"]) as found:
        model(x), model[0](x)
    assert torch.linalg.eigvalsh(found["0.weight"])[-1] > 1


def test_an_image_smaller_than_the_kernel_is_seen_in_its_middle():
    """As by a module that pads for itself, such as timm's Conv2dSame, whose `padding` is 0."""
    module = nn.Conv2d(1, 1, 3)
    with measuring_inputs(nn.Sequential(module), ["0"]) as found, contextlib.suppress(RuntimeError):
        module(torch.full((1, 1, 1, 1), 2.0))
    assert found["0.weight"].nonzero().tolist() == [[4, 4]]
    assert found["0.weight"][4, 4] == 4


@pytest.mark.parametrize(("kernel", "groups"), [(1, 1), (3, 1), (3, 16)])
def test_a_convolutions_outputs_are_nearer_than_by_k_means(kernel, groups):
    def built():
        torch.manual_seed(5)
        return nn.Sequential(nn.Conv2d(16, 64, kernel, padding=kernel // 2, groups=groups))

    def images(seed):
        """Neighbours and channels are correlated."""
        noise = torch.randn(16, 16, 8, 8, generator=torch.Generator().manual_seed(seed))
        mixed = torch.einsum("nchw,cd->ndhw", noise, torch.randn(16, 16, generator=torch.Generator().manual_seed(9)))
        return nn.functional.avg_pool2d(mixed, 3, stride=1, padding=1)

    def error(model):
        with torch.no_grad():
            return float((model(images(2)) - built()(images(2))).square().sum())

    plan = {"stages": [{"match": ".*", "block_size": 4 if kernel == 1 else 3, "n_centroids": 8}]}
    plain, fed = (quantize_(built(), plan | {"encode": how}, calibration=[images(1)], progress=quiet) for how in KINDS)
    assert error(fed) < 0.8 * error(plain)


def test_a_weight_that_only_zeros_reach_is_encoded_plainly():
    lines = []
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16), nn.Linear(16, 16))
    with torch.no_grad():
        model[2].weight.zero_(), model[2].bias.zero_()
    quantize_(
        model,
        {"stages": [{"match": "[03]", "block_size": 4, "n_centroids": 8}], "encode": "feedback"},
        calibration=[inputs()],
        progress=lines.append,
    )
    assert "note: without error feedback, since no product's inputs were measured: 3" in lines


def test_a_tied_weight_is_measured_where_it_multiplies():
    model, tokens = Tied(), torch.arange(12)[None]
    with measuring_inputs(model, ["emb"]) as found:
        model(tokens)
    x = model.emb.weight.detach()
    torch.testing.assert_close(found["emb.weight"], x.t() @ x / 12)


def test_uncorrelated_inputs_give_exactly_the_codes_of_k_means():
    identity = {"0.weight": torch.eye(16), "2.weight": torch.rand(64).diag()}
    found = quantized_state(quantized(network(), inputs=identity))
    expected = quantized_state(quantized(network(), PLAIN))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_same_seed_gives_the_same_bits_and_the_file_its_usual_form(tmp_path):
    sizes = []
    for name, plan in (("one", PLAN), ("other", PLAN), ("plain", PLAIN)):
        sizes.append(save(quantized(network(), plan), tmp_path / f"{name}.safetensors"))
    files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("one", "other", "plain")]
    assert files[0] == files[1] != files[2]
    assert len(set(sizes)) == 1
    x = inputs(5)
    torch.testing.assert_close(load(tmp_path / "one.safetensors", network())(x), quantized(network())(x))


def test_one_line_names_the_weights_without_measured_inputs():
    lines = []
    model = nn.ModuleDict({"attn": Attention(), "fc": nn.Linear(8, 32), "conv": nn.Conv1d(8, 32, 1)})
    x = torch.randn(40, 2, 8) @ torch.randn(8, 8)

    def run(model):
        model["conv"](model["fc"].weight.new_zeros(1, 8, 5))
        model["fc"](model["attn"](x))

    plan = {"stages": [{"match": ".*", "block_size": 4, "n_centroids": 4}], "encode": "feedback"}
    quantize_(model, plan, calibration=run, progress=lines.append)
    named = [line for line in lines if line.startswith("note: without error feedback")]
    assert named == [
        "note: without error feedback, since no product's inputs were measured: attn.q_proj, attn.k_proj, attn.v_proj, "
        "attn.out_proj, …"
    ]
    assert sum("output error x0." in line for line in lines) == 1
    assert len(quantized_weights(model)) == 6


@pytest.mark.parametrize("weighted", [True, False])
def test_rows_that_matter_more_lose_less(weighted):
    importance = torch.ones(64, 16)
    importance[:8] = 1000.0
    plan = PLAN | {"centroids": {"weighted": weighted}}
    model = quantized(network(), plan, importance={"0.weight": importance})
    with torch.no_grad():
        errors = (model[0](inputs()) - network()[0](inputs())).square().mean(0)  # (64,)
    assert (errors[:8].mean() < 0.5 * errors[8:].mean()) == weighted


def test_a_shared_codebook_is_fitted_to_all_its_weights():
    rule = {"match": ".*", "block_size": 4, "n_centroids": 8, "codebook": "shared"}
    model = quantized(network(), {"stages": [rule], "encode": "feedback"})
    first, second = quantized_weights(model).values()
    assert first.centroids is second.centroids
    fresh = inputs(2)
    assert error(model, fresh) < 0.7 * error(quantized(network(), {"stages": [rule]}), fresh)


def test_feedback_that_does_not_help_leaves_the_codes_of_k_means(monkeypatch):
    monkeypatch.setattr(
        "fairseq_quant_noise.quantization.feedback.refined",
        lambda layers, centroids: ([torch.zeros(len(of.weight), 4, dtype=torch.uint8) for of in layers], centroids),
    )
    only = {"stages": [{"match": "0", "block_size": 4, "n_centroids": 8}]}
    found = quantized_state(quantized(network(), only | {"encode": "feedback"}))
    expected = quantized_state(quantized(network(), only))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_range_which_product_quantization_has_not_changes_nothing():
    plan = {"stages": [PLAN["stages"][0] | {"range": "histogram"}], "encode": "feedback"}
    found, expected = (quantized_state(quantized(network(), given)) for given in (plan, PLAN))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_data_it_is_refused_before_any_work():
    model = network()
    with refuses("the plan's encode: feedback needs data; give calibration inputs, or leave it out"):
        quantize_(model, PLAN, progress=quiet)
    assert not quantized_weights(model)


def test_data_that_reaches_no_product_is_refused_before_any_work():
    model = network()
    with refuses("encode: feedback: no calibration input reached a product with a weight of the plan"):
        quantized(model, calibration=[])
    assert not quantized_weights(model)


def test_as_many_batches_are_measured_as_the_plan_says_and_none_is_lost():
    batches = iter([inputs(i, 8) for i in range(5)])
    quantized(network(), PLAN | {"encode": {"kind": "feedback", "batches": 3}}, calibration=batches)
    assert len(list(batches)) <= 2
