"""Broadcast a checkpoint from the first rank, each tensor in its own type."""

from typing import Any

import torch


def broadcast_object(obj: Any, src_rank: int, group: Any, dist_device: torch.device) -> Any:
    """What fairseq's `_broadcast_object_slow` returns: `obj` of rank `src_rank`, on every rank.

    fairseq sends what rank 0 has loaded through torch.save and torch.load, which refuses its configuration since torch
    2.6, so that no checkpoint loads on several processes. The other ranks are this program: what they send is trusted.
    """
    box = [obj]
    torch.distributed.broadcast_object_list(box, src=src_rank, group=group, device=dist_device)
    return box[0]
