"""A weight as blocks: the one place that knows which weights are covered, and how they split.

The paper cuts W into blocks b_kl and quantizes each (arXiv 2004.07320, section 3). A block here is a run of
`d` consecutive numbers of the row-major weight (rows, …), along the inputs:

    Linear, attention's in_proj_weight, LSTM   (O, I)       d divides I     a piece of one output's input weights
    Embedding, EmbeddingBag                    (V, C)       d divides C     a piece of one word's vector
    Conv1d, 2d, 3d of kernel size 1            (O, I, 1)    d divides I     as Linear (I: input channels of one group)
    Conv1d, 2d, 3d of k numbers a kernel       (O, I, k)    d divides k, or is a multiple of k that divides I*k
                                                            a piece of one kernel, or whole kernels
    Bilinear                                   (O, I, J)    as a convolution whose kernels have J numbers

so every weight turns into its (n, d) matrix of blocks by a reshape, without a copy. `ConvTranspose` and the `Conv1D` of
transformers store the inputs first, (I, O, …). They are *turned*: their blocks are those of the weight with its first
two dimensions exchanged, so that they lie along the inputs as well.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

from ..errors import UserError


class Covered(NamedTuple):
    """Parameters of a type of module that are noised and quantized."""

    module: type
    keys: str  # regular expression over the parameters' names, full match
    turned: bool = False  # stored with the inputs first


_COVERED = [
    Covered(nn.Linear, "weight"),
    Covered(nn.Embedding, "weight"),
    Covered(nn.EmbeddingBag, "weight"),
    Covered(_ConvTransposeNd, "weight", turned=True),
    Covered(_ConvNd, "weight"),
    Covered(nn.Bilinear, "weight"),
    Covered(nn.MultiheadAttention, r"(in|q|k|v)_proj_weight"),
    Covered(nn.RNNBase, r"weight_(ih|hh|hr)_l\d+(_reverse)?"),
    Covered(nn.RNNCellBase, r"weight_[ih]h"),
]
#: What the hooks of torch's weight and spectral normalisation store in the place of `weight`.
_NORMED = re.compile(r"weight_(v|orig)")
_MOST_OF_A_KERNEL = 9  # numbers: a kernel of 3 x 3


def cover(module: type, keys: str = "weight", *, turned: bool = False) -> None:
    """Let the parameters `keys` (a regular expression) of modules of a type be noised and quantized.

    The module's forward must read them as attributes of the module at each call. `turned` as in the table above.
    """
    _COVERED.insert(0, Covered(module, keys, turned))
    _rule.cache_clear()


def is_conv1d(module: type) -> bool:
    """Whether a class is the `Conv1D` of transformers, a Linear that stores (I, O); it is not imported for that."""
    return any(cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") for cls in module.__mro__)


def covered(module: nn.Module, parent: nn.Module | None = None) -> dict[str, bool]:
    """The covered weights that `module` stores, by the parameter's name: whether they are turned.

    Args:
        module: any; a weight in quantized form is a child in the parameter's place.
        parent: the module whose weight `module` computes, where it is one of torch's parametrizations.
    """
    if isinstance(module, ParametrizationList):
        key = "original1" if isinstance(module[0], _WeightNorm) else "original"
        of: Any = type(parent)
        rule = None if parent is None else _rule(of, "weight")
        return {key: rule.turned} if rule is not None and _stores(module, key) else {}
    found, kind = {}, cast(Any, type(module))
    for key in (*module._parameters, *module._modules):
        rule = _rule(kind, key)
        if rule is not None and _stores(module, key):
            found[key] = rule.turned
    return found


def _stores(module: nn.Module, key: str) -> bool:
    parameter = module._parameters.get(key)
    return (parameter is not None and parameter.dim() >= 2) or module._modules.get(key) is not None


@functools.cache
def _rule(module: Any, key: str) -> Covered | None:
    """What covers the parameter `key` of modules of a type; found once, for a model has hundreds."""
    name = "weight" if _NORMED.fullmatch(key) else key
    if is_conv1d(module):
        return Covered(module, "weight", turned=True) if name == "weight" else None
    return next((c for c in _COVERED if issubclass(module, c.module) and re.fullmatch(c.keys, name)), None)


def kinds(module: nn.Module) -> set[str]:
    """What a plan's settings may call modules like this one: by type (Linear), and by kernel (conv3x3)."""
    names = {cls.__name__ for cls in type(module).__mro__ if cls not in (object, nn.Module)}
    kernel = module.kernel_size if isinstance(module, _ConvNd) else ()
    return names | ({"conv" + "x".join(map(str, kernel))} if kernel else set())


def turn(shape: Sequence[int]) -> tuple[int, ...]:
    """`shape` with its first two dimensions exchanged."""
    return shape[1], shape[0], *shape[2:]


def divides(shape: Sequence[int], block_size: int) -> bool:
    """Whether blocks of `block_size` numbers tile a weight of this shape, (rows, …) (see the table above)."""
    row, kernel = math.prod(shape[1:]), math.prod(shape[2:])
    if kernel == 1:
        return row % block_size == 0
    return kernel % block_size == 0 or (block_size % kernel == 0 and row % block_size == 0)


def check_block_size(name: str, shape: Sequence[int], block_size: int) -> None:
    """Refuse a block size that does not tile a weight of this shape, (rows, …).

    Raises:
        UserError: the blocks do not tile the weight; the message names it, its shape and the sizes that do.
    """
    if block_size >= 1 and divides(shape, block_size):
        return
    fits = [d for d in range(1, min(math.prod(shape[1:]), 64) + 1) if divides(shape, d)]
    raise UserError(
        f"{name}: blocks of {block_size} do not divide a weight of shape {tuple(shape)}; "
        f"choose a block_size of {', '.join(map(str, fits))} for it"
    )


def fitting_block_size(shape: Sequence[int], wanted: int) -> int:
    """The block size for a weight (rows, …), where one number is given for a whole network of convolutions.

    matrices, kernels of one number    the largest one up to `wanted` that divides a row (input channels)
    other kernels                      the largest part of a kernel up to 9 numbers (9 for 3 x 3, 5 for 5 x 5), or a
                                       row of it
    """
    kernel = math.prod(shape[2:])
    if kernel == 1:
        return next(d for d in range(wanted, 0, -1) if divides(shape, d))
    part = next(d for d in range(_MOST_OF_A_KERNEL, 0, -1) if kernel % d == 0)
    return part if part > 1 else shape[-1]


def as_blocks(weight: Tensor, block_size: int) -> Tensor:
    """The (n, d) blocks of `weight`, as a view when it is contiguous.

    Args:
        weight: (rows, …), with rows that `block_size` divides (see `check_block_size`).
        block_size: d.
    """
    return weight.reshape(-1, block_size)


def code_shape(shape: tuple[int, ...], block_size: int) -> tuple[int, int]:
    """The shape of the code matrix: (rows of the weight, blocks a row)."""
    row = 1
    for size in shape[1:]:
        row *= size
    return shape[0], row // block_size
