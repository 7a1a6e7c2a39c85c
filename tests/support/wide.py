"""A network whose weights feed more than 256 centroids, so that their codes take 9 bits."""

import torch
from torch import nn

#: 1,536 blocks a weight.
WIDE_PLAN = {"stages": [{"match": ".*", "block_size": 2, "n_centroids": 300}]}


def wide_net():
    """(..., 48) to (..., 48)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48))
