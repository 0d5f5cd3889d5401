"""k-NN on frozen features: an image has the class of the training images that are nearest to it, nothing is trained.

Neighbours vote with weights exp(similarity / temperature), as in instance discrimination (arXiv 1805.01978, section
3.4) and DINO (arXiv 2104.14294), which both take temperature 0.07 and DINO k = 20; or each with one vote.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 1024  # queries whose similarities to all others are held at a time


def neighbours(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities [N, k], falling, and rows of the bank, int64 [N, k], of the k nearest to each query.

    Args:
        queries: features [N, D].
        bank: features [M, D].

    Raises:
        ValueError: the bank has fewer than k rows.
    """
    if k > len(bank):
        raise ValueError(f"eval.probe.knn_k={k} neighbours, but there are only {len(bank)} training images: lower it")
    bank = F.normalize(bank.float(), dim=1)
    found = [(F.normalize(block.float(), dim=1) @ bank.T).topk(k, dim=1) for block in queries.split(BLOCK)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def votes(similarity: Tensor, labels: Tensor, *, num_classes: int, temperature: float | None) -> Tensor:
    """Votes [N, K] of neighbours with similarities [N, k] and labels int64 [N, k]; without a temperature one each."""
    if temperature is None:
        weights = torch.ones_like(similarity)
    else:
        # A common factor changes no vote, and without it a low temperature would overflow.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
    return similarity.new_zeros(len(similarity), num_classes).scatter_add_(1, labels, weights)


def classify(
    queries: Tensor, bank: Tensor, labels: Tensor, *, k: int, num_classes: int, temperature: float | None = 0.07
) -> Tensor:
    """Classes int64 [N] of queries [N, D] by the bank [M, D] with labels int64 [M]; of equal votes the lowest class.

    Raises:
        ValueError: the bank has fewer than k rows.
    """
    similarity, rows = neighbours(queries, bank, k)
    return votes(similarity, labels[rows], num_classes=num_classes, temperature=temperature).argmax(1)
