"""Entropy losses of quantisers: each vector sure of its code, E[H(p)], and all codes in use, -H(E[p]).

The loss of MAGVIT-v2's look-up-free quantiser (arXiv 2310.05737); expectations are over the vectors of one call, which
are those of one process and of one part of an accumulated batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine.device import exact_products
from tokenizer.similarity import rows_at_once

SMALLEST = torch.finfo(torch.float32).tiny  # keeps the logarithm of a vanished probability finite


@torch.compiler.disable  # as `nearest`
def code_entropy(vectors: Tensor, book: Tensor, *, temperature: float, unit: bool) -> Tensor:
    """E[H(p)] - H(E[p]), a scalar between -ln K and 0, with p = softmax(-|z - e|^2 / temperature) over the codes.

    The token-by-code matrix is computed a tile at a time, and again in the backward pass, in full float32: a small
    temperature magnifies rounding.

    Args:
        vectors: float32 [..., D]
        book: float32 [K, D]
        unit: all codes have length 1, so that |e|^2 need not be computed.
    """
    flat = vectors.reshape(-1, vectors.shape[-1])  # [N, D]
    entropies, totals = [], []
    for part in flat.split(rows_at_once(len(book), book.device)):
        entropy, total = checkpoint(
            _entropy_of_tile, part, book, temperature, unit, use_reentrant=False, preserve_rng_state=False
        )
        entropies.append(entropy)
        totals.append(total)
    mean = torch.stack(totals).sum(dim=0) / len(flat)  # [K]
    return torch.stack(entropies).sum() / len(flat) - entropy_of(mean)


def _entropy_of_tile(vectors: Tensor, book: Tensor, temperature: float, unit: bool) -> tuple[Tensor, Tensor]:
    """The vectors' entropies added up, a scalar, and so their probabilities, [K]."""
    with exact_products(book.device):
        similarities = 2 * vectors @ book.T  # [N, K]
    if not unit:  # |z|^2, and |e|^2 of unit codes, are the same for all codes, which the softmax does not see
        similarities = similarities - book.square().sum(dim=1)
    logits = similarities / temperature
    p, log_p = F.softmax(logits, dim=-1), F.log_softmax(logits, dim=-1)  # faster than exp(log_p), which is slow near 0
    return -(p * log_p).sum(), p.sum(dim=0)


def bit_entropy(vectors: Tensor, *, scale: float, temperature: float) -> Tensor:
    """`code_entropy` for a book of all 2^D sign vectors times `scale`, p = softmax(2 z.e / temperature), exactly.

    The bits of one vector are independent, so H(p) is the sum of theirs, and p is the outer product of the two halves'
    probabilities, whose mean over the vectors is one matrix product: [N, 2^(D/2)] twice instead of [N, 2^D].

    Args:
        vectors: float32 [..., D], the numbers whose signs are the bits.
    """
    logits = 4 * scale / temperature * vectors.reshape(-1, vectors.shape[-1])  # [N, D] of a bit being 1
    sure = (F.softplus(logits) - logits * logits.sigmoid()).sum(dim=1).mean()
    middle = logits.shape[1] // 2
    first, second = (_spellings(half) for half in (logits[:, :middle], logits[:, middle:]))  # [N, 2^(D/2)]
    return sure - entropy_of(first.T @ second / len(logits))


def _spellings(logits: Tensor) -> Tensor:
    """Probability of every word of bits, from each bit's logit of being 1: [N, d] -> [N, 2^d]."""
    words = logits.new_ones(len(logits), 1)
    for bit in logits.T:
        both = torch.stack([(-bit).sigmoid(), bit.sigmoid()], dim=1)  # [N, 2]
        words = (words[:, :, None] * both[:, None]).flatten(1)
    return words


def entropy_of(p: Tensor) -> Tensor:
    """-sum p ln p over all entries, a scalar."""
    return -(p * p.clamp(min=SMALLEST).log()).sum()
