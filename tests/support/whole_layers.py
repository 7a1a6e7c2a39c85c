"""Layers of an encoder with integer weights, computed in one call and by their modules."""

import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fairseq_quant_noise import load, quantize_, save
from fairseq_quant_noise.networks import attention
from fairseq_quant_noise.networks.attention import TransformerLayer, key_mask

SCHEMES = {
    "int8": {"stages": [{"match": ".*", "scheme": "int8", "range": "channel"}]},
    "int4": {"stages": [{"match": ".*", "scheme": "int4"}]},
    "iPQ + int8": {
        "stages": [{"match": ".*", "block_size": 4, "n_centroids": 64}],
        "centroids": {"dtype": "int8"},
    },
}


def layer_of(
    scheme: str, dim: int = 64, heads: int = 4, activation: str = "gelu", before: bool = False
) -> TransformerLayer:
    """A layer (dim, 2 * dim) from a packed file, whose weights and norms are no special numbers."""
    torch.manual_seed(0)
    layer, empty = (TransformerLayer(dim, 2 * dim, heads, activation, before, causal=False).eval() for _ in range(2))
    for norm in (layer.self_attn_layer_norm, layer.final_layer_norm):
        torch.nn.init.normal_(norm.weight, 1, 0.1)
        torch.nn.init.normal_(norm.bias, 0, 0.1)
    return from_file(layer, empty, SCHEMES[scheme])


def from_file(
    layer: TransformerLayer, empty: TransformerLayer, plan: dict[str, Any], data: list[Tensor] | None = None
) -> TransformerLayer:
    """`empty` with the weights of `layer`, quantized, saved and loaded; `data` calibrates the inputs."""
    quantize_(layer, plan, calibration=data)
    with tempfile.TemporaryDirectory() as folder:
        save(layer, f"{folder}/layer.safetensors")
        return load(f"{folder}/layer.safetensors", into=empty).eval()


def by_modules(layer: TransformerLayer, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the modules of the layer compute, (B, T, C)."""
    with mock.patch.object(attention, "whole_layer", return_value=None):
        return layer(x.clone(), mask)


def both_ways(scheme: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A name, the result of one call, that of the modules; of layers of several sizes. Gradients are off."""
    sizes = ((1, 1, 64, 4), (2, 7, 64, 2), (1, 16, 48, 4), (2, 21, 96, 1), (1, 70, 64, 4))
    for i, (batch, tokens, dim, heads) in enumerate(sizes):
        activation, before = ("gelu", "relu")[i % 2], i % 3 == 1
        layer = layer_of(scheme, dim, heads, activation, before)
        x = 3 * torch.randn(batch, tokens, dim)
        padding = torch.arange(tokens) >= torch.tensor([[tokens], [max(tokens - 4, 0)]])[:batch]
        for mask in (None, key_mask(padding)):
            yield f"{batch} x {tokens} x {dim}, {activation}", layer(x, mask), by_modules(layer, x, mask)


def assert_same_layers(found: Tensor, expected: Tensor) -> None:
    """Equal, but for a few inputs of products whose rounding to 8 bits another order of sums has moved."""
    error = (found - expected).abs()
    assert float(error.norm() / expected.norm()) < 2e-3
    assert float((error > 1e-4).float().mean()) < 0.3
