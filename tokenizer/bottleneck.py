"""What stands between encoder and decoder: the contract of every bottleneck, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Output = tuple[Tensor, Tensor | None, dict[str, Tensor], dict[str, Tensor]]


class Bottleneck(nn.Module):
    """Replaces the encoder's numbers by what the decoder may see; float32 whatever the autocast.

    `bottleneck(z) -> (z_q, codes, losses, stats)` for z [B, T, input_dim], of any float type:
        z_q: float32 [B, T, latent_dim], with the encoder's gradient;
        codes: int64 [B, T * codes_per_token], a token's codes side by side; None without codes;
        losses: scalars under the names codebook, commitment, entropy (in training alone) and kl, without weights;
        stats: `vectors`, the latents float32 [B, T, latent_dim], detached.

    In eval mode `nearest(latents(z))` are the codes of z, and `lookup` of them is z_q.

    Attributes:
        input_dim: numbers per token that the encoder gives.
        latent_dim: numbers per token of the latents and of z_q.
        vocab_size: number of codes, 0 if there are none.
        codes_per_token: codes for each token.
    """

    input_dim: int
    latent_dim: int
    vocab_size: int
    codes_per_token: int = 1

    def forward(self, z: Tensor) -> Output:
        raise NotImplementedError

    def latents(self, z: Tensor) -> Tensor:
        """What a diffusion model learns, before codes are chosen: [B, T, input_dim] -> float32 [B, T, latent_dim]."""
        raise NotImplementedError

    def nearest(self, latents: Tensor) -> Tensor:
        """Codes of latents, [B, T, latent_dim] -> int64 [B, T * codes_per_token]."""
        raise NotImplementedError

    def lookup(self, codes: Tensor) -> Tensor:
        """What the decoder sees of codes, int64 [B, T * codes_per_token] -> float32 [B, T, latent_dim]."""
        raise NotImplementedError

    def distinct(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, T * codes_per_token] numbered so that those of different codebooks differ, for counting."""
        if self.codes_per_token == 1:
            return codes
        depth = torch.arange(codes.shape[1], device=codes.device) % self.codes_per_token
        return codes + depth * self.vocab_size

    def snap(self, latents: Tensor) -> Tensor:
        """What the decoder would see of latents, float32 [B, T, latent_dim] -> alike."""
        return self.lookup(self.nearest(latents))


class Codeless(Bottleneck):
    """A bottleneck with latents but without codes; `no_codes` says so, with a remedy, to who asks for some."""

    no_codes: str
    vocab_size = 0

    def nearest(self, latents: Tensor) -> Tensor:
        """Raises ValueError: there are no codes."""
        raise ValueError(self.no_codes)

    def lookup(self, codes: Tensor) -> Tensor:
        """Raises ValueError: there are no codes."""
        raise ValueError(self.no_codes)

    def snap(self, latents: Tensor) -> Tensor:
        """The latents as they are."""
        return latents.float()


def squared_error(a: Tensor, b: Tensor, reduction: str) -> Tensor:
    """Squared distance of [..., D] vectors, averaged over tokens; over the D axis a `mean` or the norm's `sum`."""
    squares = (a - b).square()
    return squares.mean() if reduction == "mean" else squares.sum(dim=-1).mean()


def straight_through(z: Tensor, code: Tensor) -> Tensor:
    """The code's value with the identity as its gradient with respect to z (arXiv 1711.00937, section 3.2)."""
    return z + (code - z).detach()


def rotation(z: Tensor, code: Tensor) -> Tensor:
    """The code's value with the gradient of the rotation and scaling that take z to it (arXiv 2410.06424, equation 4).

    `|q|/|z| (z - 2 w (w.z) + 2 q^ (z^.z))` with z^ and q^ the directions of z and the code q and w their unit bisector,
    every factor but one z held constant. A zero vector has no direction: it stays zero.
    """
    length = z.detach().norm(dim=-1, keepdim=True).clamp(min=1e-6)  # [B, T, 1]
    start, end = z.detach() / length, F.normalize(code.detach(), dim=-1)
    bisector = F.normalize(start + end, dim=-1, eps=1e-6)
    along = (bisector * z).sum(dim=-1, keepdim=True)  # [B, T, 1]
    onto = (start * z).sum(dim=-1, keepdim=True)  # [B, T, 1]
    scale = code.detach().norm(dim=-1, keepdim=True) / length  # [B, T, 1]
    return scale * (z - 2 * bisector * along + 2 * end * onto)


GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"straight_through": straight_through, "rotation": rotation}
