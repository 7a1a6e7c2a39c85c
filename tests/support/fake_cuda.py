"""Tensors that say they are on a GPU, for a machine without one: a mix of devices fails here as it does there.

Their numbers are real, in memory of the CPU, so that a test can compare them. (torch's FakeTensorMode has no numbers:
code that looks whether a weight is finite, as much of this package does, stops there.) Inside `fake_cuda()`

    torch.empty(3, device="cuda"), tensor.to("cuda"), module.to("cuda")    make such tensors
    an operation on them and on tensors of the CPU                         raises RuntimeError, where CUDA would
    torch.Generator("cuda")                                                draws the numbers of the CPU's
    a backward                                                             is not there: torch asks for an accelerator
"""

import ctypes
import functools
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from fairseq_quant_noise.kernels import gpu

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
_ATEN = torch.ops.aten
_COPIES = {_ATEN.copy_.default, _ATEN._to_copy.default}  # from one device to another
_INDEXED = {_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default, _ATEN._index_put_impl_.default}
#: Without CUDA, torch has nothing that switches to a GPU, and stops where it would.
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


@functools.cache
def _guard():
    if torch.version.cuda is not None:
        return
    home = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(_GUARD)
        flags = ["-O0", "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}"]
        subprocess.run(["c++", *flags, source, "-o", library, f"-L{home / 'lib'}", "-lc10"], check=True)
        ctypes.CDLL(str(library))


def _check(function, *given):
    """As CUDA does it: tensors of one device, and single numbers of the other."""
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
    if any(tensor.dim() and not isinstance(tensor, FakeCuda) for tensor in tensors):
        raise RuntimeError(f"{function}: Expected all tensors to be on the same device, found cuda:0 and cpu")


class FakeCuda(torch.Tensor):
    """A tensor of the device cuda:0 whose `numbers` are a tensor of the CPU."""

    @staticmethod
    def __new__(cls, numbers):
        layout = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset(), "dtype": numbers.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, **layout, device=CUDA)
        made.numbers = numbers.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in _COPIES:
            given = [args[0], *args[2:]] if function in _INDEXED else args  # indices may be on the CPU
            _check(function, given, kwargs)
        result = function(*_on_cpu(args), **_on_cpu(kwargs))
        if args and isinstance(args[0], torch.Tensor) and result is real(args[0]):
            return args[0]  # done in place
        to = kwargs.get("device")
        return result if to is not None and torch.device(to) == CPU else on_cuda(result)


class Generator(torch._C.Generator):
    """torch.Generator("cuda"), whose numbers are the CPU's."""

    device = CUDA


class _Generators:
    """torch.Generator, of either device."""

    def __new__(cls, device="cpu"):
        return Generator() if _is_cuda(device) else torch._C.Generator(device)


def real(tensor):
    """The numbers of a tensor, on the CPU."""
    return tensor.numbers if isinstance(tensor, FakeCuda) else tensor


def on_cuda(anything):
    """Tensors, in any containers, as tensors of cuda:0."""
    return tree_map_only(torch.Tensor, lambda t: t if isinstance(t, FakeCuda) else FakeCuda(t), anything)


def _is_cuda(value):
    return isinstance(value, str | torch.device) and str(value).split(":")[0] == "cuda"


def _on_cpu(anything):
    return tree_map(lambda value: CPU if _is_cuda(value) else real(value), anything)


class _Mode(TorchFunctionMode):
    """What asks for the device by its name does not come to a tensor's own dispatch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.to and isinstance(args[1] if len(args) > 1 else None, FakeCuda):
            args = args[0], CUDA, args[1].dtype
        leaves = tree_leaves((args, kwargs))
        if any(_is_cuda(leaf) for leaf in leaves) and function is not torch._C._nn._parse_to:
            result = function(*_on_cpu(args), **_on_cpu(kwargs))
            return on_cuda(result.clone() if any(result is leaf for leaf in leaves) else result)
        if function == torch.Tensor.data.__set__:
            args[0].numbers = real(args[1])
        if function is torch.Tensor.tolist:
            return real(args[0]).tolist()
        try:
            return function(*args, **kwargs)
        except NotImplementedError:  # torch.where makes tensors of its numbers before it dispatches
            _check(function, args, kwargs)
            return on_cuda(function(*_on_cpu(args), **_on_cpu(kwargs)))


@contextmanager
def fake_cuda():
    """The device cuda is there inside; the product in Triton, which reads a GPU's memory, is not."""
    _guard()
    swapped = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # ties stay, as they do on a GPU
    try:
        with (
            _Mode(),
            mock.patch.object(torch, "Generator", _Generators),
            mock.patch.object(gpu, "takes", return_value=False),
        ):
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapped)
