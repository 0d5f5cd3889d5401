"""The transformer that both generators share: attention (full, causal, cached, to a text), MLP, pre-norm block.

A block is the published one (LayerNorm, GELU, biases) or, with `modern`, one of the parts that later language models
settled on: RMSNorm (Zhang & Sennrich, 2019), SwiGLU (Shazeer, 2020), QK-norm (Henry et al., 2020; Dehghani et al.,
2023), rotary positions, no biases. Dropout falls on the same three places in both.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attention import attention, drop
from generator.rotary import Turns, rotate

tanh_gelu = partial(F.gelu, approximate="tanh")


class KVCache:
    """Keys and values of one attention layer at every position seen so far, in buffers of fixed size.

    The shapes never change, so the step that decodes one code compiles once and allocates nothing.
    """

    def __init__(
        self,
        batch_size: int,
        heads: int,
        length: int,
        head_dim: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.keys = torch.zeros(batch_size, heads, length, head_dim, device=device, dtype=dtype)  # [B, H, L, d]
        self.values = torch.zeros_like(self.keys)
        self.complete = False

    def view(self, *, rows: slice, window: int, complete: bool) -> KVCache:
        """These rows of the batch and the first `window` positions, in the same storage.

        `complete` promises that one new token is stored at a time, and that every position of the window then holds a
        key that it may see: attention needs no mask.
        """
        part = copy.copy(self)
        part.keys, part.values = (buffer[rows, :, :window] for buffer in (self.keys, self.values))
        part.complete = complete
        return part

    def update(self, keys: Tensor, values: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, H, T, d] at `position` [T]; return all of them, [B, H, L, d]."""
        for stored, new in ((self.keys, keys), (self.values, values)):
            if self.complete:
                stored[:, :, -1:] = new  # the last position, found faster
            else:
                stored.index_copy_(2, position, new.to(stored.dtype))
        return self.keys, self.values

    def seen_from(self, position: Tensor) -> Tensor | None:
        """Which of the L positions each query may see: itself and those before it, boolean [T, L]; None means all."""
        if self.complete:
            return None
        return torch.arange(self.keys.shape[2], device=position.device) <= position[:, None]


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension, in fp32 whatever the types of x and weight; the type of x stays."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


def build_norm(width: int, *, modern: bool = False) -> nn.Module:
    """The norm before a branch and before the head."""
    return RMSNorm(width) if modern else nn.LayerNorm(width)


class Attention(nn.Module):
    """Multi-head self-attention; `dropout` falls on the attention weights, in training mode only.

    `qk_norm` normalises queries and keys in each head, before they are turned.
    """

    def __init__(
        self, width: int, heads: int, *, dropout: float = 0.0, bias: bool = True, qk_norm: bool = False
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} must be a multiple of heads={heads}")
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.query_norm, self.key_norm = (RMSNorm(width // heads) if qk_norm else nn.Identity() for _ in range(2))
        self.out = nn.Linear(width, width, bias=bias)

    def forward(
        self,
        x: Tensor,
        *,
        causal: bool = False,
        cache: KVCache | None = None,
        position: Tensor | None = None,
        turns: Turns | None = None,
    ) -> Tensor:
        """Map [B, T, D] to [B, T, D].

        With a cache, `position` [T] (int64) says where in the sequence the T tokens stand, and each of them sees
        what the cache holds up to itself. `turns` rotate queries and keys, those in the cache once and for all.
        """
        query, key, value = self._heads(x)  # [B, H, T, d] each
        if turns is not None:
            query, key = rotate(query, turns), rotate(key, turns)
        mask = None
        if cache is not None:
            # is_causal aligns query 0 with key 0, so one query over cached keys would see the first key alone.
            assert position is not None, "a cache needs the positions of its new tokens"
            key, value = cache.update(key, value, position)  # [B, H, L, d] each
            mask, causal = cache.seen_from(position), False  # [T, L]
        dropout = self.dropout if self.training else 0.0
        mixed = attention(query, key, value, mask=mask, dropout=dropout, causal=causal)  # [B, H, T, d]
        return self.out(mixed.transpose(1, 2).flatten(2))  # [B, T, D]

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, T, 3, H, d]
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return self.query_norm(query), self.key_norm(key), value


class CrossAttention(nn.Module):
    """Norm, and multi-head attention in which each token asks those of a text; `qk_norm` as of `Attention`.

    Texts are padded by tokens of their own, so there is no mask.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.query_norm, self.key_norm = (RMSNorm(width // heads) if qk_norm else nn.Identity() for _ in range(2))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D], given a text [B, L, D]."""
        query = self.query(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, T, d]
        key, value = self.key_value(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, L, d] each
        mixed = attention(self.query_norm(query), self.key_norm(key), value)  # [B, H, T, d]
        return self.out(mixed.transpose(1, 2).flatten(2))  # [B, T, D]


class Dropout(nn.Module):
    """Zeroes a share `rate` of the elements and scales the rest by 1 / (1 - rate), in training mode only."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.rate) if self.training else x


class MLP(nn.Module):
    """Linear, activation (GELU, tanh approximation), dropout, linear: [..., D] to [..., D]."""

    def __init__(
        self, width: int, hidden: int, *, dropout: float = 0.0, activation: Callable[[Tensor], Tensor] = tanh_gelu
    ) -> None:
        super().__init__()
        self.rise = nn.Linear(width, hidden)
        self.activation = activation
        self.dropout = Dropout(dropout)
        self.fall = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fall(self.dropout(self.activation(self.rise(x))))


class SwiGLU(nn.Module):
    """Linear, SiLU of one half times the other, dropout, linear, no biases: [..., D] to [..., D].

    The hidden width is 2/3 of an MLP's, rounded up to a multiple of 64, so that both have about the same weights.
    """

    def __init__(self, width: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        narrow = math.ceil(2 * hidden / 3 / 64) * 64
        self.rise = nn.Linear(width, 2 * narrow, bias=False)
        self.dropout = Dropout(dropout)
        self.fall = nn.Linear(narrow, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.rise(x).chunk(2, dim=-1)
        return self.fall(self.dropout(F.silu(gate) * value))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (Xiong et al., 2020); `dropout` also falls on both branches."""

    def __init__(
        self, width: int, heads: int, *, mlp_ratio: int = 4, dropout: float = 0.0, modern: bool = False
    ) -> None:
        super().__init__()
        self.attention_norm = build_norm(width, modern=modern)
        self.attention = Attention(width, heads, dropout=dropout, bias=not modern, qk_norm=modern)
        self.mlp_norm = build_norm(width, modern=modern)
        self.mlp = (SwiGLU if modern else MLP)(width, mlp_ratio * width, dropout=dropout)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        causal: bool = False,
        cache: KVCache | None = None,
        position: Tensor | None = None,
        turns: Turns | None = None,
    ) -> Tensor:
        """Map [B, T, D] to [B, T, D]; cache, position and turns are those of `Attention`."""
        mixed = self.attention(self.attention_norm(x), causal=causal, cache=cache, position=position, turns=turns)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))  # [B, T, D]
