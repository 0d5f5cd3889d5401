"""From logits to codes: temperature, top-k, top-p, guidance, and the loop that decodes code after code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from generator.config import AutoregressiveSampleConfig
from generator.transformer import KVCache


class Decoder(Protocol):
    """What decoding asks of a network."""

    def caches(self, batch_size: int) -> list[KVCache]: ...

    def advance(self, codes: Tensor, labels: Tensor | None, position: Tensor, caches: list[KVCache]) -> Tensor: ...


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf below the k-th largest logit of each row [..., K]; ties with it stay; k=0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    least = logits.topk(k).values[..., -1:]                                       # [..., 1]
    return logits.masked_fill(logits < least, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf outside the smallest set of likeliest codes whose probabilities reach p (Holtzman et al., 2020).

    The likeliest code always stays; p=1 keeps all.
    """
    if p >= 1:
        return logits
    ordered, order = logits.sort(descending=True, stable=True)                    # [..., K]
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    before[..., 0] = 0
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(dropped, -math.inf)


def distribution(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probabilities to draw from, [..., K] in fp32: temperature (above 0), then top-k, then top-p."""
    logits = logits.float() / temperature
    return keep_top_p(keep_top_k(logits, top_k), top_p).softmax(-1)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution [B, K] at fp32 uniforms [B] in [0, 1): codes [B].

    In float64 a 24-bit uniform below 1 times the total stays below the total: no code of probability 0 is ever drawn.
    """
    cumulative = probabilities.double().cumsum(-1)                                # [B, K]
    threshold = uniforms.double()[:, None] * cumulative[:, -1:]                   # [B, 1]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)      # [B]


def choose(logits: Tensor, uniforms: Tensor, settings: AutoregressiveSampleConfig) -> Tensor:
    """One code for each row of logits [B, K]; temperature 0 takes the likeliest."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    probabilities = distribution(
        logits, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
    )
    return draw(probabilities, uniforms)


def guide(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance l_u + s (l_c - l_u) (Ho & Salimans, 2022) on [conditional; null] logits [2B, K]."""
    conditional, null = logits.float().chunk(2)
    return null + scale * (conditional - null)                                    # [B, K]


def guidance_at(progress: float, settings: AutoregressiveSampleConfig) -> float:
    """The guidance scale once a share `progress` in [0, 1] of the codes stands.

    Linear as in MAR (Li et al., 2024), cosine as in MaskBit and RAR (Yu et al., 2024) with power 1.
    """
    rise = {"constant": 1.0, "linear": progress, "cosine": 0.5 * (1 - math.cos(math.pi * progress))}
    return 1 + (settings.guidance - 1) * rise[settings.guidance_schedule]


def seeded_uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """Uniform numbers [B, T] in [0, 1) whose row k depends on seed k alone, drawn on the CPU."""
    rows = [torch.rand(length, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


@torch.no_grad()
def decode(
    decoder: Decoder,
    labels: Tensor,
    uniforms: Tensor,
    settings: AutoregressiveSampleConfig,
    *,
    null_label: int,
    prefix: Tensor | None = None,
) -> Tensor:
    """All codes [B, T]: prefill the label [B] (and a given `prefix` [B, P] of codes), then one code at a time.

    `uniforms` [B, T] decide every choice; guidance other than 1 doubles the batch with the null label.
    """
    batch_size, length = uniforms.shape
    guided = settings.guidance != 1
    copies = 2 if guided else 1
    codes = labels.new_zeros(batch_size, length)                                  # [B, T]
    done = 0 if prefix is None else prefix.shape[1]
    if prefix is not None:
        codes[:, :done] = prefix
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, null_label)])         # [2B]
    caches = decoder.caches(len(labels))
    advance = torch.compile(decoder.advance, fullgraph=True, dynamic=False) if settings.compile else decoder.advance
    position = torch.arange(length, device=codes.device)

    logits = decoder.advance(codes[:, :done].repeat(copies, 1), labels, position[: done + 1], caches)
    for step in range(done, length):
        if guided:
            logits = guide(logits, guidance_at(step / length, settings))
        codes[:, step] = choose(logits, uniforms[:, step], settings)
        if step + 1 < length:
            newest = codes[:, step : step + 1].repeat(copies, 1)
            logits = advance(newest, None, position[step + 1 : step + 2], caches)
    return codes
