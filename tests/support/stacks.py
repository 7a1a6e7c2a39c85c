"""A network with a stack of layers, and what its weights are."""

import torch
from torch import nn

PLAN = {"stages": [{"match": r"layers\.\d+\..*", "block_size": 4, "n_centroids": 8}, {"match": "emb", "block_size": 4}]}


class Layer(nn.Module):
    """A layer with a Linear, a norm and one of its own."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, dim)
        self.inner = nn.Sequential(nn.Linear(dim, dim, bias=False))

    def forward(self, x):
        """x: (..., C) -> (..., C)."""
        return x + self.inner(torch.tanh(self.fc(self.norm(x))))


class Net(nn.Module):
    """An embedding and layers."""

    def __init__(self, n_layers=4, dim=16):
        super().__init__()
        self.emb = nn.Embedding(12, dim)
        self.layers = nn.ModuleList(Layer(dim) for _ in range(n_layers))

    def forward(self, tokens):
        """tokens: (B, T) -> (B, T, C)."""
        x = self.emb(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


def net(n_layers=4, seed=0):
    torch.manual_seed(seed)
    return Net(n_layers)


def layer_of(state, i):
    """The entries of layer i, without the number."""
    return {k.partition(f"layers.{i}.")[2]: v for k, v in state.items() if f"layers.{i}." in k}
