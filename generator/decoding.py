"""From logits to codes: temperature, top-k, top-p, guidance, and the loop that decodes code after code."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from generator.config import AutoregressiveSampleConfig
from generator.transformer import KVCache

STRETCH = 64  # a compiled step looks at so many positions more at a time, so that its shapes seldom change
KINDS = 64  # of compiled steps that one process may make: numbers of rows, precisions, networks; torch's limit is 8


class Decoder(Protocol):
    """What decoding asks of a network."""

    @property
    def leading(self) -> int:
        """How many positions a condition takes in the caches before position 0."""

    def caches(self, batch_size: int) -> list[KVCache]: ...

    def advance(self, codes: Tensor, condition: Tensor | None, position: Tensor, caches: list[KVCache]) -> Tensor: ...


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf below the k-th largest logit of each row [..., K]; ties with it stay; k=0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    least = logits.topk(k).values[..., -1:]  # [..., 1]
    return logits.masked_fill(logits < least, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf outside the smallest set of likeliest codes whose probabilities reach p (Holtzman et al., 2020).

    The likeliest code always stays; p=1 keeps all.
    """
    if p >= 1:
        return logits
    ordered, order = logits.sort(descending=True, stable=True)  # [..., K]
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
    cumulative = probabilities.double().cumsum(-1)  # [B, K]
    threshold = uniforms.double()[:, None] * cumulative[:, -1:]  # [B, 1]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)  # [B]


def choose(logits: Tensor, uniforms: Tensor, settings: AutoregressiveSampleConfig) -> Tensor:
    """One code for each row of logits [B, K]; temperature 0 takes the likeliest."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    probabilities = distribution(logits, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
    return draw(probabilities, uniforms)


def guide(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance l_u + s (l_c - l_u) (Ho & Salimans, 2022) on [conditional; null] logits [2B, K]."""
    conditional, null = logits.float().chunk(2)
    return null + scale * (conditional - null)  # [B, K]


def guidance_at(progress: float, settings: AutoregressiveSampleConfig) -> float:
    """The guidance scale once a share `progress` in [0, 1) of the codes stands; 1 outside the configured interval.

    The schedules run over the whole sequence, whatever the interval: linear after MAR (Li et al., 2024), cosine as in
    MaskBit, and with its power as in RAR (Yu et al., 2024).
    """
    if not settings.guidance_start <= progress < settings.guidance_stop:
        return 1.0
    warped = progress**settings.guidance_power
    rise = {"constant": 1.0, "linear": progress, "cosine": 0.5 * (1 - math.cos(math.pi * warped))}
    return 1 + (settings.guidance - 1) * rise[settings.guidance_schedule]


def seeded_uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """Uniform numbers [B, T] in [0, 1) whose row k depends on seed k alone, drawn on the CPU."""
    rows = [torch.rand(length, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def decode(
    decoder: Decoder,
    condition: Tensor,
    uniforms: Tensor,
    settings: AutoregressiveSampleConfig,
    *,
    null: Tensor,
    prefix: Tensor | None = None,
) -> Tensor:
    """All codes [B, T] at once; arguments as of `stream`."""
    steps = stream(decoder, condition, uniforms, settings, null=null, prefix=prefix)
    [(_, codes)] = deque(steps, maxlen=1)
    return codes


@torch.no_grad()
def stream(
    decoder: Decoder,
    condition: Tensor,
    uniforms: Tensor,
    settings: AutoregressiveSampleConfig,
    *,
    null: Tensor,
    prefix: Tensor | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Code after code: yields how many stand, and all codes [B, T], a tensor that the later ones are written into.

    `uniforms` [B, T] decide every choice after the rows of the condition [B, ...] and a given `prefix` [B, P] of codes.
    Where guidance is 1, nothing is spent on it; elsewhere the rows `null`, of no condition and shaped alike, double the
    batch, and catch up with the others first.
    """
    batch_size, length = uniforms.shape
    scales = [guidance_at(step / length, settings) for step in range(length)]
    codes = torch.zeros(batch_size, length, dtype=torch.int64, device=uniforms.device)  # [B, T]
    done = 0 if prefix is None else prefix.shape[1]
    if prefix is not None:
        codes[:, :done] = prefix
    guided = any(scale != 1 for scale in scales[done:])
    rows = torch.cat([condition, null]) if guided else condition
    reader = _Reader(decoder, rows, codes, compiled=settings.compile)
    for step in range(done, length):
        logits = guide(reader.both(step), scales[step]) if scales[step] != 1 else reader.conditional(step)
        codes[:, step] = choose(logits, uniforms[:, step], settings)
        yield step + 1, codes


class _Reader:
    """Reads codes into the caches: conditional rows 0 .. B - 1 and, where guided, null rows B .. 2B - 1."""

    def __init__(self, decoder: Decoder, condition: Tensor, codes: Tensor, *, compiled: bool) -> None:
        self.advance = decoder.advance
        self.advance_one = torch.compile(decoder.advance, fullgraph=True) if compiled else None
        self.condition, self.codes, self.leading = condition, codes, decoder.leading
        self.batch_size, self.length = codes.shape
        self.caches = decoder.caches(len(condition))
        self.position = torch.arange(self.length, device=codes.device)
        self.seen, self.null_seen = 0, 0  # positions in the caches
        self.view_key: tuple[slice, int, bool] | None = None
        self.views: list[KVCache] = []

    def conditional(self, step: int) -> Tensor:
        """Logits [B, K] of code `step` from the conditional rows alone."""
        logits = self._read(slice(0, self.batch_size), self.seen, step)
        self.seen = step + 1
        return logits

    def both(self, step: int) -> Tensor:
        """Logits [2B, K] of code `step` from the conditional and the null rows."""
        if self.null_seen < self.seen:
            self._read(slice(self.batch_size, 2 * self.batch_size), self.null_seen, self.seen - 1)
        logits = self._read(slice(0, 2 * self.batch_size), self.seen, step)
        self.seen = self.null_seen = step + 1
        return logits

    def _read(self, rows: slice, first: int, last: int) -> Tensor:
        """Logits after `last`, once the positions from `first` to `last` are in the caches of these rows."""
        copies = (rows.stop - rows.start) // self.batch_size
        codes = self.codes[:, max(0, first - 1) : last].repeat(copies, 1)
        condition = self.condition[rows] if first == 0 else None
        position, window = self.position[first : last + 1], self.leading + last + 1
        alone = first == last and (first > 0 or self.leading == 0)  # a single new token
        if self.advance_one is None or first == 0 or first < last:
            return self.advance(codes, condition, position, self._view(rows, window, complete=alone))
        window = min(self.leading + self.length, -(-window // STRETCH) * STRETCH)
        with torch._dynamo.config.patch(recompile_limit=KINDS):
            return self.advance_one(codes, condition, position, self._view(rows, window, complete=False))

    def _view(self, rows: slice, window: int, *, complete: bool) -> list[KVCache]:
        if self.view_key != (rows, window, complete):
            self.view_key = rows, window, complete
            self.views = [cache.view(rows=rows, window=window, complete=complete) for cache in self.caches]
        return self.views
