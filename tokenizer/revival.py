"""Keeping every code in use: a k-means start, and revival of codes that no token has chosen for long.

Every process computes the same codebook: k-means runs on batches that all of them load and rank 0's result is taken;
revival draws its vectors with one shared seed from all processes' batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.device import Device, fill, whole
from tokenizer.quantize import Codebook
from tokenizer.similarity import nearest, normalize

VECTORS_PER_CODE = 32  # k-means reads so many vectors per code
ITERATIONS = 10


@torch.no_grad()
def kmeans(
    vectors: Tensor, num: int, *, spherical: bool, generator: torch.Generator, iterations: int = ITERATIONS
) -> Tensor:
    """Centroids [num, D] of vectors [N, D]: Lloyd's algorithm from a k-means++ start.

    A cluster that loses all its vectors restarts at one of the vectors that are served worst.

    Args:
        spherical: vectors have length 1, and so have centroids, compared by cosine (Dhillon and Modha 2001); else
            distances are Euclidean.
    """
    centroids = spread_start(vectors, num, spherical=spherical, generator=generator)  # [num, D]
    for _ in range(iterations):
        codes = nearest(vectors, centroids, unit=spherical)  # [N]
        counts = torch.bincount(codes, minlength=num)  # [num]
        sums = torch.zeros_like(centroids).index_add_(0, codes, vectors)  # [num, D]
        empty = (counts == 0).nonzero().squeeze(1)
        served = centroids[codes]  # [N, D]
        fit = (vectors * served).sum(dim=-1) if spherical else -(vectors - served).square().sum(dim=-1)  # [N]
        worst = fit.argsort(stable=True)[: len(empty)]
        centroids = normalize(sums) if spherical else sums / counts.clamp(min=1)[:, None]
        centroids[empty[: len(worst)]] = vectors[worst]
    return centroids


def spread_start(vectors: Tensor, num: int, *, spherical: bool, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): each next centre is drawn by its squared distance to those so far."""
    draws = torch.rand(num, 1, generator=generator, dtype=torch.float64).to(vectors.device)
    distance = torch.ones(len(vectors), dtype=torch.float64, device=vectors.device)  # [N]
    squares = torch.ones_like(vectors[:, :1]) if spherical else vectors.square().sum(dim=1, keepdim=True)  # [N, 1]
    chosen = []
    for draw in draws:
        cumulative = distance.cumsum(0)
        chosen.append(torch.searchsorted(cumulative, draw * cumulative[-1]).clamp(max=len(vectors) - 1))  # [1]
        last = chosen[-1]
        to_last = (squares + squares[last] - 2 * vectors @ vectors[last].T).squeeze(1).clamp(min=0)  # [N]
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
    quantizer: Codebook,
    dead: Tensor,
    vectors: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    device: Device,
    generator: torch.Generator,
) -> None:
    """Replace the `dead` codes (bool [K]) by random vectors of the batch, and let what remembers them begin anew: the
    optimizer's moments, or the moving averages.

    Args:
        quantizer: its codebook [K, D] may be whole or sharded.
        vectors: this process's latents [N, D]; all processes have as many.
    """
    codebook = quantizer.codebook
    draws = torch.randint(len(vectors) * device.world, (len(dead),), generator=generator, device=generator.device)
    fresh = gather_rows(vectors, draws.to(vectors.device), device).cpu()  # [K, D]
    fill(codebook, torch.where(dead[:, None], fresh, whole(codebook)))
    quantizer.restart_averages(dead)
    state = optimizer.state.get(codebook, {})
    for name in ("exp_avg", "exp_avg_sq"):
        if name in state:
            fill(state[name], whole(state[name]).masked_fill(dead[:, None], 0))
