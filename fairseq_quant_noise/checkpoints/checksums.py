"""Compute checksums of a checkpoint's codes, to refuse codes that another program has averaged.

fairseq's scripts/average_checkpoints.py adds every tensor and divides the sum. The sum of codes overflows its 8 bits,
and the mean of two codes is no code of either. The script keeps the first checkpoint's `extra_state`, and with it the
checksums of the codes that were there.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_CODES = (torch.uint8, torch.int32)  # the types of codes and of the entries that say how to decode them


def checksums(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Hexadecimal digests of the codes in a model's state, by the tensor's name; empty for a dense state.

    Args:
        state: tensors of any shape; those of type uint8 and int32 are codes, such as (rows, blocks per row).
    """
    return {name: _checksum(tensor) for name, tensor in state.items() if tensor.dtype in _CODES}


def changed(state: Mapping[str, Tensor], written: object) -> str | None:
    """The name of the first tensor whose checksum is not the one that was written; None if there is none.

    Args:
        state: of the model, as it was read; tensors of any shape, such as codes (rows, blocks per row).
        written: what `checksums` gave when the checkpoint was written; None in an older checkpoint.
    """
    if not isinstance(written, Mapping):
        return None
    known = (name for name in written if name in state)
    return next((name for name in known if _checksum(state[name]) != written[name]), None)


def _checksum(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:32]
