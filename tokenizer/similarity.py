"""Which code is nearest to each vector, found in tiles so that no whole token-by-code matrix ever exists."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.device import exact_products

MAX_SIMILARITIES = 2**24  # entries of one token-by-code tile: 64 MiB in float32
CACHED_SIMILARITIES = 2**20  # on a CPU, for each thread: what stays in its cache between the product and the maximum
CACHED_ROWS = 64  # but a thinner tile would multiply slowly
BLOCK = 64  # neighbouring codes whose maximum is taken first


def normalize(vectors: Tensor) -> Tensor:
    """Scale the last axis to length 1; a zero vector stays zero."""
    return F.normalize(vectors, dim=-1)


@torch.compiler.disable  # a compiled product would keep the process's precision, and the tiles would be unrolled
@torch.no_grad()
def nearest(vectors: Tensor, book: Tensor, *, unit: bool = True, max_similarities: int = MAX_SIMILARITIES) -> Tensor:
    """The nearest code of each vector, the first of several: [..., D], [K, D] -> int64 [...].

    Products are full float32, as TF32 has ten bits of mantissa, too few to tell codes of a large book apart.

    Args:
        unit: vectors and codes have length 1, so that the largest inner product is the nearest; else by Euclidean
            distance, which is the largest z.e - |e|^2 / 2.
        max_similarities: no tile has more entries.
    """
    flat = vectors.reshape(-1, vectors.shape[-1])  # [N, D]
    rows = max(1, min(rows_at_once(len(book), book.device), max_similarities // len(book)))
    with torch.autocast(book.device.type, enabled=False), exact_products(book.device):
        if unit:
            codes = [first_largest(part @ book.T) for part in flat.split(rows)]
        else:
            centre = book.mean(dim=0)  # distances do not change, and products of large common parts do not cancel
            book = book - centre
            lifted = torch.cat([book, -0.5 * book.square().sum(dim=1, keepdim=True)], dim=1).T  # [D + 1, K]
            codes = [first_largest(F.pad(part - centre, (0, 1), value=1.0) @ lifted) for part in flat.split(rows)]
    return torch.cat(codes).reshape(vectors.shape[:-1])


def rows_at_once(num_codes: int, device: torch.device) -> int:
    """How many vectors to compare with all codes at a time: a tile for the cache of a CPU, a large one on a GPU."""
    most = max(1, MAX_SIMILARITIES // num_codes)
    if device.type != "cpu":
        return most
    return min(most, max(CACHED_ROWS, CACHED_SIMILARITIES * torch.get_num_threads() // num_codes))


def first_largest(similarities: Tensor) -> Tensor:
    """`argmax(dim=-1)` of [N, K], many times faster on a CPU, where maxima are vectorised and their places are not:
    first which block of neighbours holds the maximum, then where in that block it stands."""
    block = math.gcd(similarities.shape[1], BLOCK)
    if similarities.device.type != "cpu" or block < 8:
        return similarities.argmax(dim=-1)
    blocks = similarities.unflatten(1, (-1, block))  # [N, K / block, block]
    best = blocks.amax(dim=-1).argmax(dim=-1)  # [N]
    inside = blocks[torch.arange(len(best)), best].argmax(dim=-1)  # [N]
    return best * block + inside
