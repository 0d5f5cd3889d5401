"""The codebook, by default ViT-VQGAN's: low-dimensional, l2-normalised, nearest code by cosine (arXiv 2110.04627;
second-hand). And `build_bottleneck`, which makes any bottleneck of this room."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.device import fill, whole
from tokenizer.adapters import Binary, FiniteScalar, Residual, Simple
from tokenizer.bottleneck import GRADIENTS, Bottleneck, squared_error
from tokenizer.config import QuantizerConfig, TokenizerLossConfig, TokenizerModelConfig
from tokenizer.continuous import Gaussian
from tokenizer.entropy import code_entropy
from tokenizer.similarity import nearest, normalize

SMOOTHING = 1e-5  # Laplace smoothing of the moving counts, so that no code divides by zero


class Codebook(Bottleneck):
    """Replaces vectors by the nearest of `vocab_size` codes.

    Normalised, vectors and codes have length 1: codes start as random directions of length 1, the length of k-means
    and revived codes too, so that one learning rate turns all of them at the same pace. Otherwise distances are
    Euclidean, and codes start from a normal distribution at a length of about 1.

    With `update=ema` no gradient reaches the codes; the trainer calls `ema_update` once for each step that counts.
    """

    ema_counts: Tensor  # [K], there with update=ema alone, like the next
    ema_sums: Tensor  # [K, D]

    def __init__(
        self, vocab_size: int, code_dim: int, config: QuantizerConfig, loss: TokenizerLossConfig | None = None
    ) -> None:
        super().__init__()
        self.input_dim = self.latent_dim = code_dim
        self.vocab_size, self.config, self.unit = vocab_size, config, config.normalize
        self.temperature = loss.entropy_temperature if loss and loss.entropy else None
        self.gradient = GRADIENTS[config.gradient]
        start = torch.randn(vocab_size, code_dim)
        start = normalize(start) if self.unit else start * code_dim**-0.5
        self.codebook = nn.Parameter(start, requires_grad=config.update == "gradient")  # [K, D]
        if config.update == "ema":
            self.register_buffer("ema_counts", torch.ones(vocab_size))
            self.register_buffer("ema_sums", start.clone())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The losses are `commitment` |z - sg[e]|^2, `codebook` |sg[z] - e|^2 unless the codes are moving averages, and
        `entropy` in training if it has a weight; of unit vectors where they are normalised."""
        with torch.autocast(z.device.type, enabled=False):
            z, book = self.latents(z), self._book()
            codes = nearest(z, book, unit=self.unit)  # [B, T]
            chosen = F.embedding(codes, book)  # [B, T, D]
            losses = {}
            if self.config.update == "gradient":
                losses["codebook"] = squared_error(chosen, z.detach(), self.config.reduction)
            losses["commitment"] = squared_error(z, chosen.detach(), self.config.reduction)
            if self.temperature and self.training:
                losses["entropy"] = code_entropy(z, book, temperature=self.temperature, unit=self.unit)
            return self.gradient(z, chosen), codes, losses, {"vectors": z.detach()}

    def latents(self, z: Tensor) -> Tensor:
        """Unit vectors where they are normalised, else the vectors themselves; float32 [B, T, D]."""
        return normalize(z.float()) if self.unit else z.float()

    def nearest(self, latents: Tensor) -> Tensor:
        """Codes of latents or of raw vectors, [B, T, D] -> int64 [B, T]."""
        return nearest(self.latents(latents), self._book(), unit=self.unit)

    def lookup(self, codes: Tensor) -> Tensor:
        """The code vectors, int64 [B, T] -> float32 [B, T, D]."""
        return F.embedding(codes, self._book())

    @torch.no_grad()
    def ema_update(self, counts: Tensor, sums: Tensor) -> None:
        """Move the codes to the moving average of the vectors that chose them (arXiv 1711.00937, appendix A.1).

        Args:
            counts: [K], how often each code was chosen in this step over all processes.
            sums: [K, D], the latents that chose it added up, over all processes.
        """
        self.ema_counts.lerp_(counts.to(self.ema_counts), 1 - self.config.ema_decay)
        self.ema_sums.lerp_(sums.to(self.ema_sums), 1 - self.config.ema_decay)
        total = self.ema_counts.sum()
        smoothed = (self.ema_counts + SMOOTHING) / (total + self.vocab_size * SMOOTHING) * total  # [K]
        codes = self.ema_sums / smoothed[:, None]
        fill(self.codebook, normalize(codes) if self.unit else codes)

    @torch.no_grad()
    def restart_averages(self, rows: Tensor | None = None) -> None:
        """Let the moving averages of codes that were set from outside begin anew at them, else the next update would
        undo the change; without moving averages there is nothing to do.

        Args:
            rows: bool [K], which codes; all if absent.
        """
        if self.config.update != "ema":
            return
        rows = torch.ones(self.vocab_size, dtype=torch.bool) if rows is None else rows
        rows, codes = rows.to(self.ema_sums.device), whole(self.codebook).to(self.ema_sums.device)
        self.ema_counts.masked_fill_(rows, 1)
        self.ema_sums.copy_(torch.where(rows[:, None], codes, self.ema_sums))

    def _book(self) -> Tensor:
        return normalize(self.codebook) if self.unit else self.codebook


def build_bottleneck(
    model: TokenizerModelConfig, quantizer: QuantizerConfig, loss: TokenizerLossConfig | None = None
) -> Bottleneck:
    """The bottleneck that `quantizer.kind` names; `loss` says whether it has an entropy loss, and at which temperature.

    Raises:
        ValueError: it needs a package that is not installed, or levels that it cannot have.
    """
    dim, vocab_size = model.code_dim, model.vocab_size
    if quantizer.kind == "kl":
        return Gaussian(dim)
    if quantizer.kind == "fsq":
        return FiniteScalar(quantizer.levels)
    if quantizer.kind in ("lfq", "bsq"):
        return Binary(dim, quantizer, loss)
    if quantizer.kind == "simvq":
        return Simple(vocab_size, dim, quantizer)
    if quantizer.kind == "residual":
        return Residual(vocab_size, dim, quantizer)
    return Codebook(vocab_size, dim, quantizer, loss)
