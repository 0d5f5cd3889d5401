"""Training schedules: which log SNR to train on, and how often.

A schedule is a distribution over lambda = log SNR: a standard family, moved and stretched. A uniform u becomes
lambda = location + scale * inverse(u), so lambda grows with u and the time of the papers is t = 1 - u (Hang & Gu,
2024, section 3). Draws are clamped to flow times in [1e-4, 1 - 1e-4], |lambda| <= 18.42; `pdf` and `cdf` are those
of the unclamped distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_TIME = 1e-4
MAX_LOGSNR = 2 * math.log((1 - MIN_TIME) / MIN_TIME)


@dataclass(frozen=True)
class Family:
    """A distribution on the real line with location 0 and scale 1; three functions of one tensor of any shape."""

    inverse: Callable[[Tensor], Tensor]
    cdf: Callable[[Tensor], Tensor]
    pdf: Callable[[Tensor], Tensor]


SECANT = Family(
    inverse=lambda u: 2 * torch.log(torch.tan(u * (math.pi / 2))),
    cdf=lambda z: torch.atan(torch.exp(z / 2)) * (2 / math.pi),
    pdf=lambda z: 1 / (2 * math.pi * torch.cosh(z / 2)),
)
LOGISTIC = Family(
    inverse=torch.logit,
    cdf=torch.sigmoid,
    pdf=lambda z: torch.sigmoid(z) * torch.sigmoid(-z),
)
NORMAL = Family(
    inverse=torch.special.ndtri,
    cdf=torch.special.ndtr,
    pdf=lambda z: torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi),
)

# name: family, location, scale.
SCHEDULES: dict[str, tuple[Family, float, float]] = {
    "cosine":       (SECANT, 0.0, 1.0),    # lambda = 2 ln cot(pi t / 2); p = sech(lambda / 2) / (2 pi)
    "uniform_time": (LOGISTIC, 0.0, 2.0),  # lambda = 2 ln((1 - t) / t); p = sech^2(lambda / 4) / 8; FM-OT
    "logit_normal": (NORMAL, 0.0, 2.0),    # flow time t = sigmoid(m + s z): location -2 m, scale 2 s (Esser et al.)
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A distribution over log SNR; tensors of any shape in, the same shape out."""

    family: Family
    location: float
    scale: float

    def __call__(self, u: Tensor) -> Tensor:
        """Uniform draws in [0, 1) -> float32 log SNR in [-MAX_LOGSNR, MAX_LOGSNR], increasing in u."""
        # In float64, because float32's pi / 2 lies beyond the pole of the tangent.
        logsnr = self.location + self.scale * self.family.inverse(u.double())
        return logsnr.clamp(-MAX_LOGSNR, MAX_LOGSNR).float()

    def cdf(self, logsnr: Tensor) -> Tensor:
        """Share of the draws below this log SNR: the inverse of calling the schedule."""
        return self.family.cdf((logsnr - self.location) / self.scale)

    def pdf(self, logsnr: Tensor) -> Tensor:
        """Density of the draws at this log SNR, per unit of log SNR."""
        return self.family.pdf((logsnr - self.location) / self.scale) / self.scale


def build_schedule(kind: str, *, location: float | None = None, scale: float | None = None) -> Schedule:
    """The schedule of a configuration; location and scale default to those of its row in SCHEDULES.

    Raises:
        ValueError: an unknown kind, or a scale that is not positive.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"diffusion.schedule.kind={kind!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    family, own_location, own_scale = SCHEDULES[kind]
    scale = own_scale if scale is None else scale
    if not scale > 0:
        raise ValueError(f"diffusion.schedule.scale={scale} must be positive")
    return Schedule(family=family, location=own_location if location is None else location, scale=scale)
