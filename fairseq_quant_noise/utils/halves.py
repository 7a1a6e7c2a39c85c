"""Round a tensor to fp16 where every value survives it.

With r = fl16(x), a value x survives where r is finite and |r - x| <= 2^-11 max(|x|, m), m the root mean square of its
tensor. 2^-11 is the rounding of a normal number. A subnormal one (below 2^-14) errs by up to 2^-25, which is nothing
beside a tensor of numbers of 2^-14 and more. A variance is divided by, each for itself: there m = 0. What other buffers
are for nobody knows (counts, rotary frequencies): they survive where they are exact.
"""

import torch
from torch import Tensor

_ROUNDING = 2.0**-11  # of fp16: half of the last of its 11 bits
_MEANS, _DIVISORS = "running_mean", "running_var"  # PyTorch's names of a batch normalisation's statistics


def halved(name: str, tensor: Tensor, is_buffer: bool = False) -> Tensor:
    """Round a tensor to fp16 where every value survives.

    Args:
        name: of the tensor in the network, which tells a variance.
        tensor: of any shape and type.
        is_buffer: whether it is a buffer, and no parameter.

    Returns:
        The rounded tensor, of the same shape; or `tensor` itself where it is not float32, is empty, or some value would
        not survive.
    """
    if tensor.dtype != torch.float32 or not tensor.numel():
        return tensor
    rounded, exact, own = tensor.half(), tensor.double(), name.rpartition(".")[2]
    if is_buffer and own not in (_MEANS, _DIVISORS):
        return rounded if torch.equal(rounded.float(), tensor) else tensor
    scale = 0.0 if own == _DIVISORS else float(exact.square().mean().sqrt())
    survives = (rounded.double() - exact).abs() <= _ROUNDING * exact.abs().clamp(min=scale)
    return rounded if bool(survives.all()) else tensor
