"""A weight as blocks: the one place that knows how Linear, Embedding and Conv2d split.

The paper cuts W into blocks b_kl and quantizes each (arXiv 2004.07320, section 3). A block here is a run of
`d` consecutive numbers of the row-major weight:

    Linear     (O, I)         d divides I                  a piece of one output neuron's input weights
    Embedding  (V, C)         d divides C                  a piece of one word's vector
    Conv2d 1x1 (O, I, 1, 1)   d divides I                  as Linear (I: input channels of one group)
    Conv2d kxk (O, I, k, k)   d divides k*k, or is a       a piece of one kernel, or whole kernels
                              multiple of k*k that divides I*k*k

so every weight turns into its (n, d) matrix of blocks by a reshape, without a copy.
"""

from typing import Any

from torch import Tensor, nn

from ..errors import UserError

#: The module types whose `weight` is noised and quantized.
BLOCK_MODULES = (nn.Linear, nn.Embedding, nn.Conv2d)


def divides(module: nn.Module, block_size: int) -> bool:
    """Whether blocks of `block_size` numbers tile the weight of `module` (see the table above).

    Raises:
        UserError: `module` is not one of BLOCK_MODULES.
    """
    if isinstance(module, nn.Linear):
        return module.in_features % block_size == 0
    if isinstance(module, nn.Embedding):
        return module.embedding_dim % block_size == 0
    if not isinstance(module, nn.Conv2d):
        raise UserError(f"a {type(module).__name__} has no blocks; only Linear, Embedding and Conv2d do")
    kernel = module.kernel_size[0] * module.kernel_size[1]
    channels = module.in_channels // module.groups
    if kernel == 1:
        return channels % block_size == 0
    return kernel % block_size == 0 or (block_size % kernel == 0 and channels * kernel % block_size == 0)


def check_block_size(name: str, module: nn.Module, block_size: int) -> None:
    """Refuse a block size that does not tile the weight of `module`.

    Raises:
        UserError: the blocks do not tile the weight (the message names it, its shape and the sizes that do), or
            `module` is not one of BLOCK_MODULES.
    """
    if block_size >= 1 and divides(module, block_size):
        return
    weight: Any = module.weight
    row = weight.numel() // weight.shape[0]
    fits = [d for d in range(1, min(row, 64) + 1) if divides(module, d)]
    shape = tuple(weight.shape)
    raise UserError(
        f"{name}: blocks of {block_size} do not divide a weight of shape {shape}; "
        f"choose a block_size of {', '.join(map(str, fits))} for it"
    )


def fitting_block_size(module: nn.Module, wanted: int) -> int:
    """The block size for the weight of `module`, where one number is given for a whole network of convolutions.

    Linear, Embedding, 1x1    the largest one up to `wanted` that divides a row (input channels)
    k x k                     the whole kernel up to 3 x 3, else a row of it: 9 for 3 x 3, 5 for 5 x 5

    Raises:
        UserError: `module` is not one of BLOCK_MODULES.
    """
    if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
        height, width = module.kernel_size
        return height * width if height * width <= 9 else width
    return next(d for d in range(wanted, 0, -1) if divides(module, d))


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
