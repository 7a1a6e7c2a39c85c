"""Rename the weights of old and published checkpoints to the names of fairseq 0.12."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

#: Which norm had which number: of an encoder's layer, and of a decoder's in a model for translation.
_NORMS = {
    "encoder": ("self_attn_layer_norm", "final_layer_norm"),
    "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
}
_NUMBERED_NORM = re.compile(r"((encoder|decoder)\.layers\.\d+)\.layer_norms\.(\d)\.(weight|bias)")


def modern_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of a RoBERTa or a `transformer` to fairseq 0.12's names; any other comes back as it is.

    Published checkpoints hold the three projections of an attention in one `in_proj_weight` (3 C, C) and
    `in_proj_bias` (3 C,), which are split into `q_proj`, `k_proj` and `v_proj`, (C, C) and (C,). They have no
    `version`, which is added with shape (1,). RoBERTa's say `decoder` for the encoder. Those for translation number
    their norms, and call the output's weight (words, C) `embed_out`, or leave it out where it is the embedding's.
    """
    if any(".sentence_encoder." in name for name in state):
        roberta = {re.sub(r"^decoder\.", "encoder.", name): tensor for name, tensor in state.items()}
        return {"encoder.sentence_encoder.version": torch.tensor([1.0]), **_renamed(roberta)}
    if {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} <= state.keys():
        modern = {f"{side}.version": torch.tensor([1.0]) for side in _NORMS} | _renamed(state)
        output = modern.pop("decoder.embed_out", modern["decoder.embed_tokens.weight"])
        if not any(name.startswith(("decoder.output_projection.", "decoder.adaptive_softmax.")) for name in modern):
            modern["decoder.output_projection.weight"] = output
        return modern
    return dict(state)


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    modern: dict[str, Tensor] = {}
    for old, tensor in state.items():
        name = _NUMBERED_NORM.sub(_norm, old.replace(".emb_layer_norm.", ".layernorm_embedding."))
        module, _, last = name.rpartition(".in_proj_")
        if module:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            modern |= {f"{module}.{letter}_proj.{last}": part for letter, part in parts}
        else:
            modern[name] = tensor
    return modern


def _norm(found: re.Match[str]) -> str:
    return f"{found[1]}.{_NORMS[found[2]][int(found[3])]}.{found[4]}"
