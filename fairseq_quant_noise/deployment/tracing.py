"""Trace a network into an ONNX graph without weights: each is an input of the graph, under its name in the network."""

import io
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..networks.positions import SinusoidalPositions, frequencies
from ..scalar import Affine
from .parts import Part

OPSET = 18  # of ONNX: that of onnxruntime 1.14
PREFIX = "network."  # of a weight's name in the graph, from `_Traced`


class _Traced(nn.Module):
    """A network, called by one of its parts."""

    def __init__(self, network: nn.Module, part: Part) -> None:
        super().__init__()
        self.network, self.part = network, part

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.part.run(*inputs)


class _Positions(nn.Module):
    """Sinusoidal positions of any number, computed: a table would be as long as the example's."""

    def __init__(self, of: SinusoidalPositions) -> None:
        super().__init__()
        self.dim, self.padding_idx = of.dim, of.padding_idx
        self.frequencies = frequencies(of.dim)  # (C // 2,), a constant of the graph

    def forward(self, positions: Tensor) -> Tensor:
        """positions: (B, T) int64 -> (B, T, C) fp32."""
        angles = positions.unsqueeze(-1).float() * self.frequencies  # (B, T, C // 2)
        both = torch.cat([angles.sin(), angles.cos()], -1)  # (B, T, C), or one channel less
        both = F.pad(both, (0, 1)) if self.dim % 2 else both
        return both.masked_fill(positions.eq(self.padding_idx).unsqueeze(-1), 0)


def trace(network: nn.Module, part: Part, inputs: Mapping[str, Mapping[str, Any]], in_codes: bool = False) -> bytes:
    """The graph of a part of `network`, an ONNX model whose weights are inputs called PREFIX and their name.

    Args:
        network: in eval mode, with dense weights of any value, on the CPU; it is of no use afterwards.
        part: what the graph computes.
        inputs: the modules whose input is rounded, as in `Manifest.inputs`.
        in_codes: an input that is rounded to 8 bits goes through QuantizeLinear and DequantizeLinear, not Round.
    """
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, SinusoidalPositions):
                setattr(module, name, _Positions(child))
    for name, of in inputs.items():
        _round_inputs(network.get_submodule(name), of, in_codes)
    for i, tensor in enumerate(network.state_dict().values()):
        tensor.fill_(i)  # the tracer takes equal tensors for one
    content: Any = io.BytesIO()  # which only the newer way does not take
    open_sizes = {name: given.sizes for name, given in part.inputs.items()} | part.outputs
    with warnings.catch_warnings():  # of torch: that this way of tracing is an old one, and follows one branch
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Traced(network, part).eval(),
            tuple(given.example for given in part.inputs.values()),
            content,
            dynamo=False,  # the newer way stops at `if padding.any()`
            export_params=False,
            do_constant_folding=False,
            opset_version=OPSET,
            input_names=[*part.inputs],
            output_names=[*part.outputs],
            dynamic_axes={key: {i: n for i, n in enumerate(sizes) if n} for key, sizes in open_sizes.items()},
        )
    return content.getvalue()


def _round_inputs(module: nn.Module, of: Mapping[str, Any], in_codes: bool) -> None:
    """Round the first input of `module` to codes of its range, as `InputQuantizer` does."""
    affine = Affine.of_range(torch.tensor([of["low"]]), torch.tensor([of["high"]]), of["bits"])
    scale, zero_point = affine.scale[0], affine.zero_point[0]

    def rounded(x: Tensor) -> Tensor:
        if not in_codes or affine.bits != 8:
            return affine.decode(affine.rounded(x))
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255)

    def hook(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        first, *others = given
        return rounded(first) if first.is_floating_point() else first, *others

    module.register_forward_pre_hook(hook)
