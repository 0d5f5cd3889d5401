"""Bottlenecks whose codebooks are vector-quantize-pytorch's: FSQ, LFQ, BSQ, SimVQ and residual quantisation.

That library holds the codes and spells them; its state dicts fit. What it would do in a forward pass and this project
must not is done here instead: it draws random numbers and moves codebooks while it looks (a resumed run would differ),
holds whole token-by-code matrices, adds weighted losses up, and averages entropies over processes wrongly. So nothing
here is random after construction, and the losses come one by one, unweighted.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.bottleneck import GRADIENTS, Bottleneck, squared_error, straight_through
from tokenizer.config import QuantizerConfig, TokenizerLossConfig
from tokenizer.entropy import bit_entropy
from tokenizer.similarity import nearest, normalize

MARGIN = 1e-3  # FSQ bounds a hair wider than its outermost levels


class FiniteScalar(Bottleneck):
    """FSQ (arXiv 2309.15505): each number is bounded and rounded to one of its few levels; there are no losses.

    The latents are the bounded numbers before rounding, in units of z_q, within about -1 and 1.
    """

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        if not levels or min(levels) < 3:
            raise ValueError(f"quantizer.levels={list(levels)}: fsq needs at least 3 levels for each number")
        self.levels = levels
        self.fsq = with_constants(library("fsq").FSQ(levels=list(levels), return_indices=False))
        self.input_dim = self.latent_dim = len(levels)
        self.vocab_size = math.prod(levels)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        latents = self.latents(z)
        codes = self.nearest(latents.detach())
        return straight_through(latents, self.lookup(codes)), codes, {}, {"vectors": latents.detach()}

    def latents(self, z: Tensor) -> Tensor:
        """tanh(z + shift) h - o over L // 2, with h = (L - 1)(1 + margin) / 2 and o = 1/2 for an even L, else 0; the
        shift takes z = 0 to 0 (section 3 and appendix A.1)."""
        levels, width = self._levels(z)
        half, offset = (levels - 1) * (1 + MARGIN) / 2, (levels % 2 == 0) * 0.5  # [D]
        shift = (offset / half).atanh()
        return ((z.float() + shift).tanh() * half - offset) / width

    def nearest(self, latents: Tensor) -> Tensor:
        levels, width = self._levels(latents)
        steps = torch.minimum(torch.maximum((latents.float() * width).round(), -width), levels - 1 - width)
        return self.fsq.codes_to_indices(steps / width).long()

    def lookup(self, codes: Tensor) -> Tensor:
        return self.fsq.indices_to_codes(codes).float()

    def _levels(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The levels and half of them rounded down, float32 [D]."""
        levels = torch.tensor(self.levels, dtype=torch.float32, device=like.device)
        return levels, levels.div(2, rounding_mode="floor")


class Binary(Bottleneck):
    """LFQ (arXiv 2310.05737) and BSQ (arXiv 2406.07548): the code is the signs of the vector, a bit for each number.

    z_q is +1 or -1 in every number; for BSQ the vector is first scaled to length 1, and so is z_q. The latents are the
    vector that is signed. Losses are `commitment`, and `entropy` in training if it has a weight, exact over all 2^D
    codes at the cost of two tables of 2^(D/2) numbers for each vector. Without its weight nothing keeps codes in use.
    """

    def __init__(self, code_dim: int, config: QuantizerConfig, loss: TokenizerLossConfig | None = None) -> None:
        super().__init__()
        self.spherical, self.reduction = config.kind == "bsq", config.reduction
        self.temperature = loss.entropy_temperature if loss and loss.entropy else None
        self.scale = code_dim**-0.5 if self.spherical else 1.0
        lfq = library(config.kind).LFQ(dim=code_dim, spherical=self.spherical)
        lfq.codebook = lfq.codebook[:0]  # all codes written out, which only its own losses read
        self.lfq = with_constants(lfq)
        self.input_dim = self.latent_dim = code_dim
        self.vocab_size = 2**code_dim

    def train(self, mode: bool = True) -> Binary:
        """The library's part stays in eval mode, in which it computes codes alone."""
        super().train(mode)
        self.lfq.eval()
        return self

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        with torch.autocast(z.device.type, enabled=False):
            z = self.latents(z)
            codes = self.nearest(z.detach())
            signs = self.lookup(codes)  # [B, T, D]
            losses = {"commitment": squared_error(z, signs, self.reduction)}
            if self.temperature and self.training:
                losses["entropy"] = bit_entropy(z, scale=self.scale, temperature=self.temperature)
            return straight_through(z, signs), codes, losses, {"vectors": z.detach()}

    def latents(self, z: Tensor) -> Tensor:
        return normalize(z.float()) if self.spherical else z.float()

    def nearest(self, latents: Tensor) -> Tensor:
        return self.lfq(latents.float())[1].long()

    def lookup(self, codes: Tensor) -> Tensor:
        return self.lfq.indices_to_codes(codes).float()


class Simple(Bottleneck):
    """SimVQ (arXiv 2411.02038): the codes are one learned linear map of random vectors that never change, so that every
    gradient moves all of them. Nearest by Euclidean distance; latents are the encoder's vectors themselves."""

    def __init__(self, vocab_size: int, code_dim: int, config: QuantizerConfig) -> None:
        super().__init__()
        self.simvq = with_constants(library("simvq").SimVQ(dim=code_dim, codebook_size=vocab_size))
        self.gradient, self.reduction = GRADIENTS[config.gradient], config.reduction
        self.input_dim = self.latent_dim = code_dim
        self.vocab_size = vocab_size

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        with torch.autocast(z.device.type, enabled=False):
            z, book = self.latents(z), self.simvq.codebook
            codes = nearest(z, book, unit=False)  # [B, T]
            chosen = F.embedding(codes, book)  # [B, T, D]
            losses = {
                "codebook": squared_error(chosen, z.detach(), self.reduction),
                "commitment": squared_error(z, chosen.detach(), self.reduction),
            }
            return self.gradient(z, chosen), codes, losses, {"vectors": z.detach()}

    def latents(self, z: Tensor) -> Tensor:
        return z.float()

    def nearest(self, latents: Tensor) -> Tensor:
        return nearest(latents.float(), self._book(), unit=False)

    def lookup(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self._book())

    def _book(self) -> Tensor:
        weight = self.simvq.frozen_codebook
        with torch.autocast(weight.device.type, enabled=False):
            return self.simvq.codebook


class Residual(Bottleneck):
    """Residual quantisation (arXiv 2107.03312): each of a token's `depth` codes is the nearest to what the codes before
    it have left over, and z_q is their sum. Euclidean; latents are the encoder's vectors themselves.

    The losses are means over the depth, so that their weights mean what they mean with one codebook: `codebook` draws
    each code to what it stands for, `commitment` the vector to each partial sum (arXiv 2203.01941).
    """

    def __init__(self, vocab_size: int, code_dim: int, config: QuantizerConfig) -> None:
        super().__init__()
        rvq = library("residual").ResidualVQ(dim=code_dim, num_quantizers=config.depth, codebook_size=vocab_size)
        self.books = nn.Parameter(rvq.codebooks.clone())  # [q, K, D]; in one piece, as sharding takes modules apart
        self.gradient, self.reduction = GRADIENTS[config.gradient], config.reduction
        self.input_dim = self.latent_dim = code_dim
        self.vocab_size, self.codes_per_token = vocab_size, config.depth

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        with torch.autocast(z.device.type, enabled=False):
            z = self.latents(z)
            codes = self.nearest(z)  # [B, T q]
            chosen = self._chosen(codes)  # [q, B, T, D]
            sums = chosen.cumsum(dim=0)
            wanted = z.detach() - (sums - chosen).detach()  # [q, B, T, D]
            losses = {
                "codebook": squared_error(chosen, wanted, self.reduction),
                "commitment": squared_error(z.expand_as(sums), sums.detach(), self.reduction),
            }
            return self.gradient(z, sums[-1]), codes, losses, {"vectors": z.detach()}

    def latents(self, z: Tensor) -> Tensor:
        return z.float()

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        rest, found = latents.float(), []
        for book in self.books:
            found.append(nearest(rest, book, unit=False))  # [B, T]
            rest = rest - F.embedding(found[-1], book)
        return torch.stack(found, dim=-1).flatten(1)

    def lookup(self, codes: Tensor) -> Tensor:
        return self._chosen(codes).cumsum(dim=0)[-1]

    def _chosen(self, codes: Tensor) -> Tensor:
        """The vectors of every depth, int64 [B, T q] -> [q, B, T, D]."""
        by_depth = codes.unflatten(1, (-1, self.codes_per_token)).unbind(dim=-1)  # q times [B, T]
        return torch.stack([F.embedding(part, book) for part, book in zip(by_depth, self.books, strict=True)])


def library(kind: str) -> ModuleType:
    """vector-quantize-pytorch.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import vector_quantize_pytorch
    except ImportError as error:
        remedy = "pip install 'tokenloom[quantizers]'"
        raise ValueError(f"quantizer.kind={kind} needs the package vector-quantize-pytorch: {remedy}") from error
    return vector_quantize_pytorch


def with_constants(module: nn.Module) -> Any:
    """Let the module's constants be part of its state dict, so that a model built without values can be loaded."""
    for part in module.modules():
        for name, value in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, value)
    return module
