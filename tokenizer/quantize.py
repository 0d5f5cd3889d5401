"""The codebook of ViT-VQGAN: low-dimensional, l2-normalised, nearest code by cosine (arXiv 2110.04627; second-hand)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.config import QuantizerConfig

MAX_SIMILARITIES = 2**24  # entries of one token-by-code matrix: 64 MiB in float32


class Codebook(nn.Module):
    """Replaces unit vectors by the nearest of `vocab_size` unit codes; float32 whatever the autocast.

    Codes start as random directions of length 1, the length of k-means and revived codes too, so that one learning
    rate turns all of them at the same pace.
    """

    def __init__(self, vocab_size: int, code_dim: int, config: QuantizerConfig) -> None:
        super().__init__()
        self.reduction, self.gradient = config.reduction, GRADIENTS[config.gradient]
        self.codebook = nn.Parameter(normalize(torch.randn(vocab_size, code_dim)))  # [K, D]

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """`quantize(z) -> (z_q, codes, losses, stats)`, what every quantiser of this room offers.

        Args:
            z: [B, T, D], any length and float type.

        Returns:
            z_q: float32 [B, T, D], the unit codes, with the encoder's gradient flowing through the normalisation;
            codes: int64 [B, T];
            losses: scalars `codebook` |sg[z] - e|^2 and `commitment` |z - sg[e]|^2, unweighted;
            stats: `vectors`, the detached unit vectors float32 [B, T, D].
        """
        with torch.autocast(z.device.type, enabled=False):
            z, book = normalize(z.float()), normalize(self.codebook)
            codes = nearest(z, book)  # [B, T]
            chosen = F.embedding(codes, book)  # [B, T, D]
            losses = {
                "codebook": squared_error(chosen, z.detach(), self.reduction),
                "commitment": squared_error(z, chosen.detach(), self.reduction),
            }
            return self.gradient(z, chosen), codes, losses, {"vectors": z.detach()}

    def lookup(self, codes: Tensor) -> Tensor:
        """The unit code vectors, int64 [B, T] -> float32 [B, T, D]."""
        return F.embedding(codes, normalize(self.codebook))

    def nearest(self, z: Tensor) -> Tensor:
        """Codes of raw vectors, [B, T, D] -> int64 [B, T]."""
        return nearest(normalize(z.float()), normalize(self.codebook))


def normalize(vectors: Tensor) -> Tensor:
    """Scale the last axis to length 1; a zero vector stays zero."""
    return F.normalize(vectors, dim=-1)


@torch.no_grad()
def nearest(vectors: Tensor, book: Tensor, *, max_similarities: int = MAX_SIMILARITIES) -> Tensor:
    """The code with the largest inner product, which for unit vectors is the nearest: [..., D], [K, D] -> int64 [...].

    Tokens are taken in chunks, so that no more than `max_similarities` inner products exist at a time.
    """
    flat = vectors.reshape(-1, vectors.shape[-1])  # [N, D]
    rows = max(1, max_similarities // book.shape[0])
    with torch.autocast(vectors.device.type, enabled=False):
        codes = [(chunk @ book.T).argmax(dim=-1) for chunk in flat.split(rows)]
    return torch.cat(codes).reshape(vectors.shape[:-1])


def squared_error(a: Tensor, b: Tensor, reduction: str) -> Tensor:
    """Squared distance of [..., D] vectors, averaged over tokens; over the D axis a `mean` or the norm's `sum`."""
    squares = (a - b).square()
    return squares.mean() if reduction == "mean" else squares.sum(dim=-1).mean()


def straight_through(z: Tensor, code: Tensor) -> Tensor:
    """The code's value with the identity as its gradient with respect to z (arXiv 1711.00937, section 3.2)."""
    return z + (code - z).detach()


def rotation(z: Tensor, code: Tensor) -> Tensor:
    """The code's value with the gradient of the rotation that takes z to it (arXiv 2410.06424, equation 4).

    `z - 2 w (w.z) + 2 code (z.z)` with w the unit bisector of z and the code, every factor but one z held constant.
    """
    start, end = z.detach(), code.detach()
    bisector = F.normalize(start + end, dim=-1, eps=1e-6)
    along = (bisector * z).sum(dim=-1, keepdim=True)  # [B, T, 1]
    onto = (start * z).sum(dim=-1, keepdim=True)  # [B, T, 1]
    return z - 2 * bisector * along + 2 * end * onto


GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"straight_through": straight_through, "rotation": rotation}
