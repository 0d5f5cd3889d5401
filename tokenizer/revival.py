"""Keeping every code in use: a k-means start, and revival of codes that no token has chosen for long.

Every process computes the same codebook: k-means runs on batches that all of them load and rank 0's result is taken;
revival draws its vectors with one shared seed from all processes' batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.device import Device, fill, whole
from tokenizer.quantize import nearest, normalize

VECTORS_PER_CODE = 32  # k-means reads so many vectors per code
ITERATIONS = 10
NEVER = 2**40  # steps


class Usage:
    """Counts steps for each code, int64 [K] on the CPU: `idle` since its last use, `waited` since that or revival."""

    def __init__(self, vocab_size: int) -> None:
        self.idle = torch.full((vocab_size,), NEVER)
        self.waited = torch.zeros(vocab_size, dtype=torch.int64)

    def update(self, counts: Tensor) -> None:
        """Take in how often each code was chosen in one step over all processes, [K]."""
        chosen = counts.cpu() > 0
        self.idle, self.waited = (torch.where(chosen, 0, steps + 1) for steps in (self.idle, self.waited))

    def share(self, steps: int) -> float:
        """Share of the codes chosen in the last `steps` steps."""
        return (self.idle < steps).double().mean().item()

    def expired(self, steps: int) -> Tensor:
        """Codes that have waited for `steps` steps or more, bool [K]; their wait begins anew."""
        dead = self.waited >= steps
        self.waited = self.waited.masked_fill(dead, 0)
        return dead


def perplexity(counts: Tensor) -> float:
    """exp(entropy) of how often each code was chosen, [K]: K when all are equally frequent, 1 when one is."""
    shares = counts.double() / counts.sum()
    return torch.special.entr(shares).sum().exp().item()


@torch.no_grad()
def spherical_kmeans(vectors: Tensor, num: int, *, generator: torch.Generator, iterations: int = ITERATIONS) -> Tensor:
    """Unit centroids [num, D] of unit vectors [N, D]: Lloyd's algorithm by cosine (Dhillon and Modha 2001),
    from a k-means++ start.

    A cluster that loses all its vectors restarts at one of the vectors that are served worst.
    """
    centroids = spread_start(vectors, num, generator=generator)  # [num, D]
    for _ in range(iterations):
        codes = nearest(vectors, centroids)  # [N]
        counts = torch.bincount(codes, minlength=num)  # [num]
        sums = torch.zeros_like(centroids).index_add_(0, codes, vectors)  # [num, D]
        empty = (counts == 0).nonzero().squeeze(1)
        similarity = (vectors * centroids[codes]).sum(dim=-1)  # [N]
        worst = similarity.argsort(stable=True)[: len(empty)]
        centroids = normalize(sums)
        centroids[empty[: len(worst)]] = vectors[worst]
    return centroids


def spread_start(vectors: Tensor, num: int, *, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): each next centre is drawn by its squared distance to those so far."""
    draws = torch.rand(num, 1, generator=generator, dtype=torch.float64).to(vectors.device)
    distance = torch.ones(len(vectors), dtype=torch.float64, device=vectors.device)  # [N]
    chosen = []
    for draw in draws:
        cumulative = distance.cumsum(0)
        chosen.append(torch.searchsorted(cumulative, draw * cumulative[-1]).clamp(max=len(vectors) - 1))  # [1]
        to_last = (2 - 2 * vectors @ vectors[chosen[-1]].T).squeeze(1).clamp(min=0)  # [N]
        distance = torch.minimum(distance, to_last)
    return vectors[torch.cat(chosen)]


def gather_rows(vectors: Tensor, wanted: Tensor, device: Device) -> Tensor:
    """Rows `wanted` (int64 [M]) of all processes' vectors [N, D] joined in rank order: [M, D], the same on all."""
    own = wanted - device.rank * len(vectors)
    mine = (own >= 0) & (own < len(vectors))
    rows = vectors.new_zeros(len(wanted), vectors.shape[1])
    rows[mine] = vectors[own[mine]]
    return device.sum(rows)


@torch.no_grad()
def revive(
    codebook: Tensor,
    dead: Tensor,
    vectors: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    device: Device,
    generator: torch.Generator,
) -> None:
    """Replace the `dead` rows (bool [K]) by random vectors of the batch and forget the optimizer's moments of them.

    Args:
        codebook: the parameter [K, D], whole or sharded.
        vectors: this process's unit encoder vectors [N, D]; all processes have as many.
    """
    draws = torch.randint(len(vectors) * device.world, (len(dead),), generator=generator, device=generator.device)
    fresh = gather_rows(vectors, draws.to(vectors.device), device).cpu()  # [K, D]
    fill(codebook, torch.where(dead[:, None], fresh, whole(codebook)))
    state = optimizer.state.get(codebook, {})
    for name in ("exp_avg", "exp_avg_sq"):
        if name in state:
            fill(state[name], whole(state[name]).masked_fill(dead[:, None], 0))
