"""Layers in codes whose products are prepared, beside the same product of the decoded weight."""

import torch
import torch.nn.functional as F
from torch import nn

from fairseq_quant_noise.layers import quantize_weight_
from fairseq_quant_noise.weights.discovery import find_weights


def layer_in_codes(rows, inner, d, k=256, bias=True, seed=0):
    """A Linear in codes, in evaluation, and its weight."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(inner, rows, bias=bias).eval()
    (weight,) = find_weights(layer)
    codes = torch.randint(k, (rows, inner // d), generator=generator)
    quantize_weight_(weight, codes, torch.randn(k, d, generator=generator))
    return layer, layer._modules["weight"]


def assert_follows(layer, x):
    """That the layer multiplies by what its weight is now, the first time and when all is prepared."""
    with torch.no_grad():
        expected = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
        for _ in range(3):
            torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=2e-5 * float(expected.abs().max()))


def assert_prepared_products():
    """For weights with a panel and without, and all numbers of rows that choose another form."""
    for rows, inner, d, k in (
        (64, 40, 4, 256),
        (128, 512, 8, 200),
        (192, 30, 3, 256),
        (100, 64, 8, 256),
        (64, 32, 4, 300),
    ):
        for bias in (True, False):
            layer, _ = layer_in_codes(rows, inner, d, k, bias)
            for n in (1, 2, 3, 5, 6, 7, 12, 13, 40):
                assert_follows(layer, torch.randn(n, inner))
            assert_follows(layer, torch.randn(2, 3, inner))
            assert_follows(layer, torch.randn(inner))
