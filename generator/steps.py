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
from generator.published_steps import PUBLISHED, published_stops
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
    aligned: tuple[float, ...] = ()
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


def as_aligned(span: Span) -> Tensor:
    """The schedule that was optimised for the network, in as many steps as are wanted."""
    return along(span.aligned, span.num)


def as_published(name: str) -> Steps:
    """A published schedule of ten steps, in as many as are wanted."""
    return lambda span: along(published_stops(name), span.num)


def along(stops: Sequence[float], num: int) -> Tensor:
    """Levels of `num` steps at equal distances along the stops of a schedule; where the last step ends is no level.

    Between stops the logarithm of the noise is interpolated linearly (Sabour et al., 2024, section 3.3), which is the
    log SNR: with as many steps as the schedule has, or half of them, the levels are stops of it.
    """
    given = torch.tensor(stops, dtype=torch.float64)  # [m + 1]
    places = torch.arange(num, dtype=torch.float64) * (len(given) - 1) / num
    before = places.long()
    return torch.lerp(given[before], given[before + 1], places - before)


STEPS: dict[str, Steps] = {
    "cosine":  uniform_cosine,
    "flow":    uniform_flow,
    "time":    uniform_schedule,
    "logsnr":  uniform_logsnr,
    "karras":  karras,
    "list":    as_listed,
    "aligned": as_aligned,
    **{name: as_published(name) for name in PUBLISHED},
}  # fmt: skip
WITHOUT_ZERO_SNR = ("logsnr", "karras", "aligned", *PUBLISHED)  # whose first level is a number


def solver_levels(
    kind: str,
    num: int,
    *,
    first: float,
    last: float,
    rho: float = 7.0,
    listed: Sequence[float] = (),
    aligned: Sequence[float] = (),
    schedule: Schedule | None = None,
    from_zero_snr: bool = False,
) -> Tensor:
    """Increasing log SNRs, float64 [num]; kind "list" has as many as are `listed`.

    Args:
        kind: a row of STEPS.
        first, last: where sampling starts, and where kinds that cannot end at clean data end.
        rho: exponent of kind "karras".
        listed: the levels of kind "list".
        aligned: log SNRs of an optimised schedule and of the end of its last step, rising, for kind "aligned". It and
            the published ones have ends of their own in place of `first` and `last`.
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
    span = Span(
        num=num, first=-math.inf if from_zero_snr else first, last=last, rho=rho, listed=tuple(listed),
        aligned=tuple(aligned), schedule=schedule,
    )  # fmt: skip
    _check_needs(kind, span, from_zero_snr)
    levels = STEPS[kind](span)
    if from_zero_snr:
        levels[0] = -math.inf
    if not (bool((levels.diff() > 0).all()) and float(levels[-1]) <= LARGEST_LOGSNR):
        raise ValueError(
            f"diffusion.sample.steps={kind} with num_steps={num}, first_logsnr={first} stops at log SNRs from"
            f" {float(levels[0]):.6g} to {float(levels[-1]):.6g}, which must rise, to {LARGEST_LOGSNR:.0f} at most:"
            " lower first_logsnr or num_steps, or use steps=cosine"
        )
    return levels


def _check_needs(kind: str, span: Span, from_zero_snr: bool) -> None:
    if kind == "time" and span.schedule is None:
        raise ValueError("diffusion.sample.steps=time are steps of a training schedule: give it, or use steps=cosine")
    if kind == "karras" and not span.rho > 0:
        raise ValueError(f"diffusion.sample.rho={span.rho} must be positive")
    if from_zero_snr and kind in WITHOUT_ZERO_SNR:
        raise ValueError(f"diffusion.sample.from_zero_snr has no place in steps={kind}: use cosine or flow")
    if kind == "list":
        _check_list(torch.tensor(span.listed, dtype=torch.float64))
    if kind == "aligned" and len(span.aligned) < 2:
        raise ValueError(
            "diffusion.sample.steps=aligned are levels that were optimised for a trained network, and there are none:"
            " run `tokenloom steps --config ...`, or use steps=karras"
        )


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
