"""Checksums of a checkpoint's codes, so that codes that another program averaged are refused when they are read.

fairseq's scripts/average_checkpoints.py adds every tensor and divides the sum. The sum of codes overflows its 8 bits,
and the mean of two codes is no code of either. The script keeps the first checkpoint's `extra_state`, and with it the
checksums of the codes that were there.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_CODES = (torch.uint8, torch.int32)  # the dtypes of codes, and of what says how to read them


def checksums(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Hexadecimal digests of the codes in a model's state, by the tensor's name; none of a dense state."""
    return {name: _checksum(tensor) for name, tensor in state.items() if tensor.dtype in _CODES}


def changed(state: Mapping[str, Tensor], written: object) -> str | None:
    """The first tensor that differs from the one whose checksum was written; None without one.

    Args:
        state: of the model, as it was read.
        written: what `checksums` gave when the checkpoint was written; of an older checkpoint None.
    """
    if not isinstance(written, Mapping):
        return None
    known = (name for name in written if name in state)
    return next((name for name in known if _checksum(state[name]) != written[name]), None)


def _checksum(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:32]
