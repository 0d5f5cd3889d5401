"""A bottleneck without codes: the latents of a variational autoencoder (arXiv 1312.6114)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.bottleneck import Codeless

LOG_VARIANCE = (-30.0, 20.0)  # beyond these its exponential is useless in float32


class Gaussian(Codeless):
    """The encoder gives mean and log variance of each latent; training draws from that normal distribution.

    The draws come from torch's default generator, which a resumable trainer seeds for each step.
    """

    no_codes = "quantizer.kind=kl has latents but no codes: train a diffusion model on them, or choose another kind"

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.input_dim, self.latent_dim = 2 * latent_dim, latent_dim

    def forward(self, z: Tensor) -> tuple[Tensor, None, dict[str, Tensor], dict[str, Tensor]]:
        """The loss is `kl`, the divergence from a standard normal distribution (appendix B), summed over the numbers of
        a token and averaged over tokens. In eval mode z_q is the mean."""
        mean, log_variance = z.float().chunk(2, dim=-1)  # [B, T, D]
        log_variance = log_variance.clamp(*LOG_VARIANCE)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=-1).mean()
        sample = mean
        if self.training:
            sample = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, device=mean.device)
        return sample, None, {"kl": kl}, {"vectors": mean.detach()}

    def latents(self, z: Tensor) -> Tensor:
        """The mean, [B, T, 2 D] -> float32 [B, T, D]."""
        return z.float().chunk(2, dim=-1)[0]
