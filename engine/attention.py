"""Attention by the fused kernel, or written out where that is slow: in bf16 on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 2**21  # scores at a time: 4 MiB in bf16, which the last cache of a CPU holds


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """softmax(query key^T / sqrt(d)) value: [B, H, T, d], [B, H, L, d] twice -> [B, H, T, d].

    Args:
        mask: boolean [T, L], which keys each query sees.
        dropout: share of the attention weights set to 0, in training mode or not.
        causal: query t sees the keys up to t; not together with a mask.
    """
    if torch.compiler.is_compiling() and not torch.is_grad_enabled() and query.is_cpu and query.shape[-2] == 1:
        return of_one_query(query, key, value, mask=mask)
    if query.dtype == torch.bfloat16 and query.device.type == "cpu":
        return written_out(query, key, value, mask=mask, dropout=dropout, causal=causal)
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, causal)


def of_one_query(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None) -> Tensor:
    """`attention` of one query [B, H, 1, d] as sums of products in fp32, which the compiler turns into loops that read
    each key and value once."""
    scores = (query.float() * query.shape[-1] ** -0.5 * key.float()).sum(-1)  # [B, H, L]
    scores = scores if mask is None else scores.masked_fill(~mask[0], float("-inf"))
    mixed = (scores.softmax(-1)[..., None] * value.float()).sum(-2, keepdim=True)  # [B, H, 1, d]
    return mixed.to(query.dtype)


@torch.compiler.disable  # its loop would be unrolled into a graph that takes minutes to compile
def written_out(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, dropout: float, causal: bool, tile: int = TILE
) -> Tensor:
    """`attention` as matrix products, a few heads at a time.

    The scores of one step never leave the cache, forward or backward, so that the products run at full speed. The
    fused kernel's backward pass in bf16 takes 1.3 (1024 tokens) to 8 times (16 tokens) as long.
    """
    T, L = query.shape[-2], key.shape[-2]
    if causal:
        mask = torch.ones(T, L, dtype=torch.bool, device=query.device).tril()
    bias = None if mask is None else torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    heads = max(1, tile // (T * L))
    mixed = []
    query = query * query.shape[-1] ** -0.5
    for q, k, v in zip(*(each.flatten(0, 1).split(heads) for each in (query, key, value)), strict=True):
        scores = q @ k.mT if bias is None else torch.baddbmm(bias, q, k.mT)  # [heads, T, L]
        mixed.append(drop(scores.softmax(-1), dropout) @ v)  # [heads, T, d]
    return torch.cat(mixed).unflatten(0, query.shape[:2])


def drop(x: Tensor, rate: float) -> Tensor:
    """Dropout of a tensor. torch's own draws one number after the other on a CPU, where it takes half of a training
    step; there, sixteen bits for each element are cut from 64-bit numbers instead (so `rate` is exact to 2^-16).
    """
    if rate == 0 or not x.is_cpu:
        return F.dropout(x, rate)
    numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = numbers.view(torch.int16)[: x.numel()].view(x.shape) >= round(rate * 2**16) - 2**15
    return x * kept.to(x.dtype).mul_(1 / (1 - rate))
