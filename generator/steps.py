"""Where a solver stops on its way from noise to data: log SNRs at which it asks the network, in increasing order.

After the last of them a solver goes to the clean latents, so n levels are n steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from generator.path import cosine_logsnr, cosine_time, flow_logsnr, flow_time, noise_to_signal
from generator.schedule import Schedule

LARGEST_LOGSNR = 700.0  # not far beyond it a float64 sigma is 0


@dataclass(frozen=True, kw_only=True)
class Span:
    """What a grid of steps may depend on; log SNRs rise from `first` to `last`."""

    num: int
    first: float
    last: float
    rho: float = 7.0
    listed: tuple[float, ...] = ()
    schedule: Schedule | None = None


# -> float64 log SNR [n]
Steps = Callable[[Span], Tensor]


def uniform_cosine(span: Span) -> Tensor:
    """Equal distances in the cosine schedule's time from `first` to clean data; `last` has no part in it."""
    return cosine_logsnr(_towards_zero(cosine_time(_level(span.first)), span.num))


def uniform_flow(span: Span) -> Tensor:
    """Equal distances in the linear flow's time from `first` to clean data; `last` has no part in it."""
    return flow_logsnr(_towards_zero(flow_time(_level(span.first)), span.num))


def uniform_schedule(span: Span) -> Tensor:
    """Equal distances in the training schedule's own time t = 1 - cdf, from `first` to t = 0; `last` has no part in it.

    A schedule without draws as noisy as `first` starts at its noisiest.
    """
    assert span.schedule is not None
    u = span.schedule.cdf(_level(span.first))  # not t: far tails would be lost in 1 - t
    levels = span.schedule.inverse(u + (1 - u) * torch.arange(span.num, dtype=torch.float64) / span.num)
    return levels.clamp(min=span.first)  # where u is too small for float64


def uniform_logsnr(span: Span) -> Tensor:
    """Equal distances in log SNR from `first` to `last`, as clean data lies infinitely far away."""
    return torch.linspace(span.first, span.last, span.num, dtype=torch.float64)


def karras(span: Span) -> Tensor:
    """Equal distances in s^(1 / rho), s = sigma / alpha, from `first` to `last` (Karras et al., 2022, equation 5)."""
    start, end = (float(noise_to_signal(_level(logsnr))) ** (1 / span.rho) for logsnr in (span.first, span.last))
    return -2 * span.rho * torch.linspace(start, end, span.num, dtype=torch.float64).log()


def as_listed(span: Span) -> Tensor:
    """The given levels."""
    return torch.tensor(span.listed, dtype=torch.float64)


STEPS: dict[str, Steps] = {
    "cosine": uniform_cosine,
    "flow":   uniform_flow,
    "time":   uniform_schedule,
    "logsnr": uniform_logsnr,
    "karras": karras,
    "list":   as_listed,
}  # fmt: skip


def solver_levels(
    kind: str,
    num: int,
    *,
    first: float,
    last: float,
    rho: float = 7.0,
    listed: Sequence[float] = (),
    schedule: Schedule | None = None,
    from_zero_snr: bool = False,
) -> Tensor:
    """Increasing log SNRs, float64 [num]; kind "list" has as many as are `listed`.

    Args:
        kind: a row of STEPS.
        first, last: where sampling starts, and where kinds that cannot end at clean data end.
        rho: exponent of kind "karras".
        listed: the levels of kind "list".
        schedule: the training schedule, for kind "time".
        from_zero_snr: the first level is -inf instead; the others are spaced from there (a list's first is replaced).

    Raises:
        ValueError: an unknown kind, fewer than one step, levels in the wrong order, what a kind needs is missing, or
            the steps find no room above `first`.
    """
    if kind not in STEPS:
        raise ValueError(f"diffusion.sample.steps={kind!r} is unknown; choose one of {', '.join(STEPS)}")
    if num < 1:
        raise ValueError(f"diffusion.sample.num_steps={num} must be at least 1")
    if not first < last:
        raise ValueError(
            f"diffusion.sample.first_logsnr={first} must lie below last_logsnr={last}: sampling goes from noise to data"
        )
    _check_needs(kind, rho, listed, schedule, from_zero_snr)
    start = -math.inf if from_zero_snr else first
    levels = STEPS[kind](Span(num=num, first=start, last=last, rho=rho, listed=tuple(listed), schedule=schedule))
    if from_zero_snr:
        levels[0] = -math.inf
    if not (bool((levels.diff() > 0).all()) and float(levels[-1]) <= LARGEST_LOGSNR):
        raise ValueError(
            f"diffusion.sample.steps={kind} with num_steps={num}, first_logsnr={first} stops at log SNRs from"
            f" {float(levels[0]):.6g} to {float(levels[-1]):.6g}, which must rise, to {LARGEST_LOGSNR:.0f} at most:"
            " lower first_logsnr or num_steps, or use steps=cosine"
        )
    return levels


def _check_needs(
    kind: str, rho: float, listed: Sequence[float], schedule: Schedule | None, from_zero_snr: bool
) -> None:
    if kind == "time" and schedule is None:
        raise ValueError("diffusion.sample.steps=time are steps of a training schedule: give it, or use steps=cosine")
    if kind == "karras" and not rho > 0:
        raise ValueError(f"diffusion.sample.rho={rho} must be positive")
    if from_zero_snr and kind in ("logsnr", "karras"):
        raise ValueError(f"diffusion.sample.from_zero_snr has no place in steps={kind}: use cosine or flow")
    if kind == "list":
        _check_list(torch.tensor(listed, dtype=torch.float64))


def _check_list(levels: Tensor) -> None:
    rising = len(levels) > 0 and bool(levels.isfinite().all()) and bool((levels.diff() > 0).all())
    if not rising:
        raise ValueError(
            f"diffusion.sample.levels={levels.tolist()} must be finite log SNRs that rise from noise to data;"
            " from_zero_snr=true starts without any signal"
        )


def _level(logsnr: float) -> Tensor:
    return torch.tensor(logsnr, dtype=torch.float64)


def _towards_zero(time: Tensor, num: int) -> Tensor:
    return time * (1 - torch.arange(num, dtype=torch.float64) / num)
