"""The language model that training is measured on, as fairseq builds it, and one step of it."""

from argparse import Namespace
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_NAME_REGISTRY, MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from torch import nn

import fairseq_quant_noise

fairseq_quant_noise.register()
STOCK, OURS = "transformer_lm_gpt", "quant_noise_transformer_lm_base"
LENGTH = 128  # tokens of a row


def build(arch: str, layers: int, dim: int, words: int, **options: Any) -> nn.Module:
    """A decoder of `layers` layers of width `dim`, feed-forward 4 x `dim`, embedding and softmax tied."""
    sizes = {
        "decoder_layers": layers,
        "decoder_embed_dim": dim,
        "decoder_ffn_embed_dim": 4 * dim,
        "decoder_attention_heads": 8,
        "share_decoder_input_output_embed": True,
        "max_target_positions": LENGTH,
        "tokens_per_sample": LENGTH,
        "add_bos_token": False,
        "tpu": False,
        "dropout": 0.1,
        "activation_fn": "relu",
    }
    args = Namespace(**sizes, **options)
    ARCH_CONFIG_REGISTRY[arch](args)
    name = ARCH_MODEL_NAME_REGISTRY[arch]
    cfg = MODEL_DATACLASS_REGISTRY[name].from_namespace(args)
    dictionary = Dictionary()
    for i in range(words - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary, output_dictionary=dictionary)
    torch.manual_seed(0)
    model: nn.Module = MODEL_REGISTRY[name].build_model(cfg, task)
    return model.to(device())


def device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def step(model: nn.Module, tokens: int) -> Callable[[], None]:
    """A training step of `model`: forward, cross entropy, backward, Adam, on rows of random words."""
    words = model.decoder.embed_tokens.num_embeddings  # type: ignore[union-attr]
    rows = torch.randint(4, words, (tokens // LENGTH, LENGTH + 1), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    rows = rows.to(device())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()

    def run() -> None:
        optimizer.zero_grad()
        logits, _ = model(rows[:, :-1])
        F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten()).backward()
        optimizer.step()

    return run
