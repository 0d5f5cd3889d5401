"""Where a solver stops on its way from noise to data: log SNRs at which it asks the network, in increasing order.

After the last of them a solver goes to the clean latents, so n levels are n steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from generator.path import cosine_logsnr, cosine_time, flow_logsnr, flow_time

# (number of steps, first log SNR, last log SNR) -> float64 log SNR [n]
Steps = Callable[[int, float, float], Tensor]


def uniform_cosine(num: int, first: float, last: float) -> Tensor:
    """Equal distances in the cosine schedule's time from `first` to clean data; `last` has no part in it."""
    return cosine_logsnr(_towards_zero(cosine_time(_level(first)), num))


def uniform_flow(num: int, first: float, last: float) -> Tensor:
    """Equal distances in the linear flow's time from `first` to clean data; `last` has no part in it."""
    return flow_logsnr(_towards_zero(flow_time(_level(first)), num))


def uniform_logsnr(num: int, first: float, last: float) -> Tensor:
    """Equal distances in log SNR from `first` to `last`, as clean data lies infinitely far away."""
    return torch.linspace(first, last, num, dtype=torch.float64)


STEPS: dict[str, Steps] = {
    "cosine": uniform_cosine,
    "flow":   uniform_flow,
    "logsnr": uniform_logsnr,
}  # fmt: skip


def solver_levels(kind: str, num: int, *, first: float, last: float) -> Tensor:
    """`num` increasing log SNRs, float64 [num].

    Raises:
        ValueError: an unknown kind, fewer than one step, or levels in the wrong order.
    """
    if kind not in STEPS:
        raise ValueError(f"diffusion.sample.steps={kind!r} is unknown; choose one of {', '.join(STEPS)}")
    if num < 1:
        raise ValueError(f"diffusion.sample.num_steps={num} must be at least 1")
    if not first < last:
        raise ValueError(
            f"diffusion.sample.first_logsnr={first} must lie below last_logsnr={last}: sampling goes from noise to data"
        )
    return STEPS[kind](num, first, last)


def _level(logsnr: float) -> Tensor:
    return torch.tensor(logsnr, dtype=torch.float64)


def _towards_zero(time: Tensor, num: int) -> Tensor:
    return time * (1 - torch.arange(num, dtype=torch.float64) / num)
