"""Products that were prepared: they follow every change of the weight, and say what they keep."""

import copy
import io

import pytest
import torch
from prepared_products import assert_follows, assert_prepared_products, layer_in_codes

from fairseq_quant_noise.kernels import cpu
from fairseq_quant_noise.kernels.prepared import LARGEST_PANEL, Prepared

HAS_PANELS = cpu.library() is not None and cpu.library().panel_rows() > 0
with_panels = pytest.mark.skipif(not HAS_PANELS, reason="this processor has no use for a decoded panel")


@pytest.fixture
def warm():
    """A layer of 64 x 32 that has multiplied 2 rows, its weight, and such rows."""
    layer, weight = layer_in_codes(64, 32, 4)
    x = torch.randn(2, 32)
    assert_follows(layer, x)
    assert weight._prepared is not None
    return layer, weight, x


def test_a_prepared_product_is_that_with_the_decoded_weight():
    assert_prepared_products()


@pytest.mark.parametrize(
    "change",
    [
        lambda layer, weight: weight.centroids.data.mul_(2),
        lambda layer, weight: setattr(weight.centroids, "data", weight.centroids.data * 3),
        lambda layer, weight: setattr(weight, "centroids", torch.nn.Parameter(weight.centroids * 3)),
        lambda layer, weight: weight.codes.add_(1),
        lambda layer, weight: setattr(weight, "codes", weight.codes.clone().flip(0)),
        lambda layer, weight: layer.bias.data.add_(1),
        lambda layer, weight: setattr(layer.bias, "data", layer.bias.data + 1),
        lambda layer, weight: setattr(layer, "bias", None),
        lambda layer, weight: setattr(layer.bias, "data", torch.randn(128)[::2]),
        lambda layer, weight: layer.load_state_dict({k: v.flip(0) for k, v in layer.state_dict().items()}),
        lambda layer, weight: layer.share_memory(),
    ],
)
def test_it_follows_a_change(warm, change):
    layer, weight, x = warm
    with torch.no_grad():
        change(layer, weight)
    assert_follows(layer, x)


def test_inputs_of_other_kinds_go_the_other_way(warm):
    layer, _, _ = warm
    for x in (torch.randn(32, 2).t(), torch.randn(2, 64)[:, ::2], torch.randn(3, 2, 32).transpose(0, 1)):
        assert_follows(layer, x)
    with torch.no_grad():
        assert layer(torch.randn(0, 32)).shape == (0, 64)
    assert layer(torch.randn(2, 32)).requires_grad  # gradients are on


@pytest.mark.parametrize("rows", [1, 2, 8, 12, 13])
def test_the_first_product_is_the_same_as_those_after_it(rows):
    layer, _ = layer_in_codes(64, 32, 4)
    x = torch.randn(rows, 32)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)


@with_panels
def test_a_panel_is_made_once_by_all_threads_together(warm):
    _, weight, _ = warm
    panel = weight._prepared.panel
    assert panel is not None
    weight._prepared._decode()  # as by a thread that has seen no panel yet
    assert weight._prepared.panel is panel


def test_inputs_in_another_order_leave_what_is_prepared(warm):
    layer, weight, x = warm
    prepared = weight._prepared
    assert_follows(layer, x.t().contiguous().t())
    assert weight._prepared is prepared


def test_modules_with_biases_of_their_own_share_a_weight(warm):
    layer, weight, x = warm
    other = torch.randn(64)
    with torch.no_grad():
        without = layer(x) - layer.bias
        torch.testing.assert_close(weight.product(x, other), without + other)
        torch.testing.assert_close(weight.product(x, None), without)
        torch.testing.assert_close(layer(x), without + layer.bias)


@pytest.mark.parametrize("ready", [True, False])
def test_a_row_of_another_length_is_refused(ready):
    """It used to be read as rows of the weight's length."""
    layer, _ = layer_in_codes(64, 32, 4)
    if ready:
        assert_follows(layer, torch.randn(2, 32))
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes"):
        layer(torch.randn(2, 64))


def test_another_dtype_is_followed(warm):
    layer, _, x = warm
    layer.double()
    assert_follows(layer, x.double())


def test_a_copy_and_a_pickle_prepare_their_own(warm):
    layer, _, x = warm
    twin, buffer = copy.deepcopy(layer), io.BytesIO()
    torch.save(layer._modules["weight"], buffer)
    buffer.seek(0)
    pickled = torch.load(buffer, weights_only=False)
    assert twin._modules["weight"]._prepared is None
    assert pickled._prepared is None
    with torch.no_grad():
        layer._modules["weight"].centroids.mul_(5)
    assert_follows(twin, x)
    assert_follows(layer, x)


def test_training_lets_it_go(warm):
    layer, weight, x = warm
    layer.train()
    assert weight._prepared is None
    assert_follows(layer.eval(), x)


@with_panels
@pytest.mark.parametrize(("n", "panels"), [(1, 0), (2, 1), (12, 1), (13, 0)])
def test_the_decoded_weight_is_kept_for_2_to_12_rows_and_counted(n, panels):
    layer, weight = layer_in_codes(64, 32, 4)
    assert_follows(layer, torch.randn(n, 32))
    kept = [t for t in weight.kept() if t.dtype == torch.float16]
    assert [t.numel() for t in kept] == [64 * 32] * panels


@with_panels
def test_nothing_is_kept_of_a_large_weight_or_one_that_float16_does_not_hold():
    large, weight = layer_in_codes(LARGEST_PANEL // 512 + 64, 512, 8)
    assert_follows(large, torch.randn(4, 512))
    assert weight._prepared.panel is None
    codes, centroids = torch.randint(256, (8, 64), dtype=torch.uint8).t(), torch.randn(256, 4)
    prepared = Prepared.of(codes, centroids, centroids.clone(), centroids)
    with torch.no_grad():
        found = prepared.linear(torch.ones(4, 32), codes, centroids, None)
    torch.testing.assert_close(found[0], centroids[codes.long()].sum((1, 2)), rtol=1e-5, atol=1e-4)
    assert prepared.panel is None
