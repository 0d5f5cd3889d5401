"""The transformer that both generators share: attention (full, causal, cached), MLP, pre-LN block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attention import attention, drop


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

    def update(self, keys: Tensor, values: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, H, T, d] at `position` [T]; return all of them, [B, H, L, d]."""
        self.keys.index_copy_(2, position, keys.to(self.keys.dtype))
        self.values.index_copy_(2, position, values.to(self.values.dtype))
        return self.keys, self.values

    def seen_from(self, position: Tensor) -> Tensor:
        """Which of the L positions each query may see: itself and those before it, boolean [T, L]."""
        return torch.arange(self.keys.shape[2], device=position.device) <= position[:, None]


class Attention(nn.Module):
    """Multi-head self-attention; `dropout` falls on the attention weights, in training mode only."""

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} must be a multiple of heads={heads}")
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, *, causal: bool = False, cache: KVCache | None = None, position: Tensor | None = None
    ) -> Tensor:
        """Map [B, T, D] to [B, T, D].

        With a cache, `position` [T] (int64) says where in the sequence the T tokens stand, and each of them sees
        what the cache holds up to itself.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))                      # [B, T, 3, H, d]
        query, key, value = qkv.permute(2, 0, 3, 1, 4)                            # [B, H, T, d] each
        mask = None
        if cache is not None:
            # is_causal aligns query 0 with key 0, so one query over cached keys would see the first key alone.
            assert position is not None, "a cache needs the positions of its new tokens"
            key, value = cache.update(key, value, position)                       # [B, H, L, d] each
            mask, causal = cache.seen_from(position), False                       # [T, L]
        dropout = self.dropout if self.training else 0.0
        mixed = attention(query, key, value, mask=mask, dropout=dropout, causal=causal)  # [B, H, T, d]
        return self.out(mixed.transpose(1, 2).flatten(2))                         # [B, T, D]


class Dropout(nn.Module):
    """Zeroes a share `rate` of the elements and scales the rest by 1 / (1 - rate), in training mode only."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.rate) if self.training else x


class MLP(nn.Module):
    """Linear, GELU (tanh approximation), dropout, linear: [..., D] to [..., D]."""

    def __init__(self, width: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.rise = nn.Linear(width, hidden)
        self.dropout = Dropout(dropout)
        self.fall = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fall(self.dropout(F.gelu(self.rise(x), approximate="tanh")))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (Xiong et al., 2020); `dropout` also falls on both branches."""

    def __init__(self, width: int, heads: int, *, mlp_ratio: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout=dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_ratio * width, dropout=dropout)
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Tensor, *, causal: bool = False, cache: KVCache | None = None, position: Tensor | None = None
    ) -> Tensor:
        mixed = self.attention(self.attention_norm(x), causal=causal, cache=cache, position=position)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))                       # [B, T, D]
