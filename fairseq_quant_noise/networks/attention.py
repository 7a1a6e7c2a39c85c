"""Implement attention and the Transformer layer under fairseq's names, without fairseq.

They exist so that a packed file runs where fairseq is not installed. The projections are called as modules: each
reads its own `weight` (noised, or decoded from codes) at use. Dropout is left alone.

Shapes: B batch, T tokens, S tokens of the memory (the encoder's output), P tokens before, C channels, M channels of the
memory, H heads, L layers.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import in_graph
from .whole_layer import whole_layer

#: fairseq's nonlinearities, by its names.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_accurate": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "linear": lambda x: x,
}
_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu_, "gelu": torch.ops.aten.gelu_}


def spendable(x: Tensor) -> bool:
    """Whether x (...), just computed, may be overwritten: in inference mode, where nothing asks for it again.

    A large tensor costs more to allocate than to fill. A graph has its own memory, and no_grad leaves hooks their x.
    """
    return not in_graph() and torch.is_inference_mode_enabled() and x.is_inference()


def activate(x: Tensor, name: str) -> Tensor:
    """The nonlinearity `name`, one of ACTIVATIONS, of a tensor (...) that the caller does not read again: (...)."""
    return (_IN_PLACE.get(name, ACTIVATIONS[name]) if spendable(x) else ACTIVATIONS[name])(x)


class Past:
    """Keys and values of the tokens before, so that a token costs a step and not the whole text again.

    Each attention to its own sequence takes its part when it is called, in the order of the layers.

    Args:
        keys_values: (L, 2, B, H, P, C/H); P may be 0.
    """

    def __init__(self, keys_values: Tensor) -> None:
        self._before = keys_values
        self._made: list[Tensor] = []

    @property
    def length(self) -> int:
        """P."""
        return self._before.shape[4]

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Those of a layer's new tokens, (B, H, T, C/H) each, after those before: (B, H, P + T, C/H) each."""
        both = torch.cat([self._before[len(self._made)], torch.stack([k, v])], 3)  # (2, B, H, P + T, C/H)
        self._made.append(both)
        return both[0], both[1]

    def present(self) -> Tensor:
        """What `keys_values` is at the next call, (L, 2, B, H, P + T, C/H), once every layer has been called."""
        return torch.stack(self._made)

    def mask(self, n_tokens: int) -> Tensor:
        """Which keys each of the T new tokens sees, those up to itself: (T, P + T) bool."""
        keys = torch.arange(self.length + n_tokens, device=self._before.device)
        return keys <= keys[self.length :, None]


class Attention(nn.Module):
    """Multi-head attention of every token to its own sequence, or to a memory.

    Args:
        dim: C.
        n_heads: H.
        causal: to its own sequence: no token sees those after it.
        memory_dim: M, or None for attention to its own sequence.
    """

    def __init__(self, dim: int, n_heads: int, causal: bool = True, memory_dim: int | None = None) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.causal = causal and memory_dim is None
        self.k_proj = nn.Linear(memory_dim or dim, dim)
        self.v_proj = nn.Linear(memory_dim or dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, memory: Tensor | None = None, past: Past | None = None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C).

        Args:
            x: (B, T, C).
            mask: None where no key is padding, else what `causal_mask` (or, if not `causal`, `key_mask`) returns; with
                `past`, its own.
            memory: (B, S, M), or its keys and values (2, B, H, S, C/H), or None for attention to its own sequence.
            past: the keys and values of the tokens before, for attention to its own sequence.
        """
        q = self._heads(self.q_proj(x))
        if memory is not None and memory.dim() == 5:
            k, v = memory.unbind()
        else:
            k, v = self.keys_values(x if memory is None else memory)
        if past is not None:
            k, v = past.extend(k, v)
        if mask is not None and torch.onnx.is_in_onnx_export():  # one of truth values would cost a look for NaN
            mask = torch.where(mask, 0.0, torch.finfo(q.dtype).min)
        is_causal = self.causal and mask is None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)  # (B, H, T, C/H)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence (B, T, M): (B, H, T, C/H) each."""
        return self._heads(self.k_proj(x)), self._heads(self.v_proj(x))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, H, T, C/H)."""
        return x.unflatten(2, (self.n_heads, -1)).transpose(1, 2)


class TransformerLayer(nn.Module):
    """Self-attention, attention to a memory and a feed-forward block, each added to its input and normalized.

    Args:
        dim: C.
        ffn_dim: inner width of the feed-forward block.
        n_heads: H.
        activation_fn: of the feed-forward block, one of ACTIVATIONS.
        normalize_before: LayerNorm before each block instead of after it.
        causal: no token sees those after it.
        memory_dim: M, or None for a layer that attends to no memory.
        eps: what every LayerNorm adds to the variance.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        n_heads: int,
        activation_fn: str,
        normalize_before: bool,
        causal: bool = True,
        memory_dim: int | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.normalize_before = normalize_before
        self.activation_fn = activation_fn
        self.self_attn = Attention(dim, n_heads, causal)
        self.self_attn_layer_norm = nn.LayerNorm(dim, eps)
        self.encoder_attn = None if memory_dim is None else Attention(dim, n_heads, memory_dim=memory_dim)
        self.encoder_attn_layer_norm = None if memory_dim is None else nn.LayerNorm(dim, eps)
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, dim)
        self.final_layer_norm = nn.LayerNorm(dim, eps)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """x: (B, T, C) -> (B, T, C); memory (B, S, M), the masks and the past as in `Attention`."""
        found = None if past is not None or self.encoder_attn is not None else self._whole(x, mask)
        if found is not None:
            return found
        x = self._block(x, self.self_attn_layer_norm, lambda y: self.self_attn(y, mask, past=past))
        attend, norm = self.encoder_attn, self.encoder_attn_layer_norm
        if attend is not None and norm is not None:
            x = self._block(x, norm, lambda y: attend(y, memory_mask, memory))
        return self._block(x, self.final_layer_norm, self._feed_forward)

    def _whole(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """The layer without a memory in one call, (B, T, C), or None where that is not the same."""
        own: dict[str, Any] = self._modules  # at once: nn.Module finds an attribute there in half a microsecond
        of = own["self_attn"]
        if type(of) is not Attention or of.causal or of._forward_hooks or of._forward_pre_hooks:
            return None
        norms = own["self_attn_layer_norm"], own["final_layer_norm"]
        products = *map(of._modules.get, ("q_proj", "k_proj", "v_proj", "out_proj")), own["fc1"], own["fc2"]
        return whole_layer(x, mask, of.n_heads, self.normalize_before, self.activation_fn, norms, products)

    def _block(self, x: Tensor, norm: nn.Module, block: Callable[[Tensor], Tensor]) -> Tensor:
        if self.normalize_before:
            return _add(x, block(norm(x)))
        normalized: Tensor = norm(_add(x, block(x)))
        return normalized

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.fc2(activate(self.fc1(x), self.activation_fn))


def _add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, both (B, T, C); y is not read again."""
    return y.add_(x) if spendable(y) and x.dtype == y.dtype else x + y


def causal_mask(padding: Tensor) -> Tensor | None:
    """Which keys each query may see: those up to itself that are no padding.

    Args:
        padding: (B, T) bool, True where a token is padding.

    Returns:
        (B, 1, T, T) bool, or None where no token is padding.
    """
    keys = key_mask(padding)
    if keys is None:
        return None
    places = torch.arange(padding.shape[1], device=padding.device)
    return (places <= places[:, None]) & keys  # not `tril`: of truth values, older onnxruntimes have none


def key_mask(padding: Tensor) -> Tensor | None:
    """Which keys every query may see: those that are no padding.

    Args:
        padding: (B, T) bool, True where a token is padding.

    Returns:
        (B, 1, 1, T) bool, or None where no token is padding.
    """
    return ~padding[:, None, None, :] if padding.any() else None
