"""Small models, and what several tests ask of a weight or of an error."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import forks
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fairseq_quant_noise.errors import UserError
from fairseq_quant_noise.layers import adopt_quantized
from fairseq_quant_noise.noise import attach_rules
from fairseq_quant_noise.plan.rules import NoiseRule


class Read(nn.Module):
    """Its output is the weight of `part`, as a forward sees it."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self):
        return self.part.weight


class Tied(nn.Module):
    """An embedding and an output projection that share one Parameter."""

    def __init__(self, words=12, dim=8):
        super().__init__()
        self.emb = nn.Embedding(words, dim, padding_idx=1)
        self.out = nn.Linear(dim, words, bias=False)
        self.out.weight = self.emb.weight

    def forward(self, tokens):
        return self.out(self.emb(tokens))


class Attention(nn.Module):
    """Self-attention as fairseq's fast path does it: the projections' weights go straight to a functional."""

    def __init__(self, dim=8, heads=2):
        super().__init__()
        self.dim, self.heads = dim, heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        """x: (T, B, C) -> (T, B, C)."""
        return F.multi_head_attention_forward(
            *(x, x, x, self.dim, self.heads, None),
            in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.out_proj.weight,
            out_proj_bias=self.out_proj.bias,
            need_weights=False,
            use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
        )[0]


class Zoo(nn.Module):
    """Tied embedding and projection, LayerNorm, attention, Linear with a bias, depthwise Conv2d, buffer."""

    def __init__(self, words=16, dim=8):
        super().__init__()
        self.emb = nn.Embedding(words, dim, padding_idx=1)
        self.norm = nn.LayerNorm(dim)
        self.attn = Attention(dim)
        self.fc = nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.out = nn.Linear(dim, words, bias=False)
        self.out.weight = self.emb.weight
        self.register_buffer("scale", torch.ones(1))

    def forward(self, tokens):
        """tokens: (B, T) -> (B, T, words)."""
        x = self.norm(self.emb(tokens) * self.scale)
        x = x + self.attn(x.transpose(0, 1)).transpose(0, 1)
        x = x + torch.relu(self.fc(x))
        x = x + self.conv(x.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)
        return self.out(x)


#: Quantizes every weight of a Zoo.
ZOO_PLAN = {
    "stages": [
        {"match": r"fc|attn\..*", "block_size": 4},
        {"match": "emb", "block_size": 8},
        {"match": "conv", "block_size": 9},
    ]
}
#: The same with a codebook for fc and attn together.
SHARED_PLAN = {
    "stages": [
        {"match": r"fc|attn\..*", "block_size": 4, "codebook": "shared"},
        {"match": "emb", "block_size": 8},
        {"match": "conv", "block_size": 9},
    ]
}
#: The same in N bits, by the kinds of range, and in two schemes.
INT_PLANS = {
    "int8": {"stages": [{"match": ".*", "scheme": "int8"}]},
    "int4 by channel": {"stages": [{"match": ".*", "scheme": "int4", "range": "channel"}]},
    "int3 by histogram": {"stages": [{"match": ".*", "scheme": "int3", "range": "histogram"}]},
    "int8 centroids": ZOO_PLAN | {"centroids": {"dtype": "int8"}},
    "mixed": {
        "stages": [
            {"match": r"attn\..*", "block_size": 4},
            {"match": "emb", "scheme": "int8", "range": "channel"},
            {"match": "fc|conv", "scheme": "int4"},
        ],
        "centroids": {"dtype": "int8"},
    },
}
#: Codes, and ranges for the inputs of the modules that are called (`Attention` calls none of its own).
INPUTS_PLAN = {"stages": [{"match": "emb|fc|conv", "scheme": "int8"}], "activations": {"range": "tensor"}}
#: Run first in a Python of its own.
WITHOUT_FAIRSEQ = '''
import sys

class Blocks:
    """An import of fairseq fails, as where it is not installed."""
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fairseq":
            raise ImportError("fairseq is blocked")

sys.meta_path.insert(0, Blocks())
'''
TOKENS = torch.tensor([[3, 5, 7, 1, 2], [0, 15, 4, 4, 9]])


def python(*arguments, env=None, fresh=True, **settings):
    """A Python of its own that can import the package; if not `fresh`, one that has imported torch and fairseq."""
    root = Path(__file__).parents[2]
    env = {
        **(env or os.environ),
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'scripts/torchvision_operators'}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *map(str, arguments)] if fresh else forks.command("python", *arguments)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False, **settings)


def zoo(seed=0):
    torch.manual_seed(seed)
    return Zoo()


def quiet(line):
    """A `progress` that prints nothing."""


def noised(model, p=0.5, block_size=4, match=".*"):
    """`model` in training mode, with noise by one rule."""
    attach_rules(model, [NoiseRule(match, p, block_size=block_size)])
    return model.train()


def by_torch(weight, affine):
    """phi_intN by torch's operators, on the ranges of `affine`."""
    top = 2**affine.bits - 1
    if affine.scale.numel() > 1:
        return torch.fake_quantize_per_channel_affine(weight, affine.scale, affine.zero_point, 0, 0, top)
    return torch.fake_quantize_per_tensor_affine(weight, affine.scale, affine.zero_point, 0, top)


def adopting(model, state):
    """`model` made ready for `state` and loaded with it, strictly."""
    adopt_quantized(model, state)
    model.load_state_dict(state)
    return model


def hits(seen, block_size):
    """(n,) bool: the blocks of a weight that are all zero."""
    return seen.detach().reshape(-1, block_size).eq(0).all(1)


def weight_of(linear):
    """The weight that calling a Linear without bias applies."""
    return linear(torch.eye(linear.in_features)).t()


def stored(module):
    """The weight in store."""
    return module._parameters["weight"]


@contextmanager
def refuses(match, kind=UserError):
    """Expect an error of exactly this kind, in one line that matches."""
    with pytest.raises(kind, match=match) as caught:
        yield caught
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
