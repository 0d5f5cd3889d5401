"""Solvers: from noise to data with any `denoise(x, logsnr) -> x0`.

All state is x = x_t / alpha = x0 + s eps with s = sigma / alpha (EDM's variables: Karras et al., 2022), so no solver
knows the path, and the probability-flow ODE is dx/ds = (x - x0(x)) / s. Levels come in increasing log SNR; the step
after the last one goes to x0 itself. Arithmetic is float32, or float64 if x is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from generator.path import noise_to_signal

# (x [B, ...], log SNR [B]) -> x0 [B, ...]
Denoise = Callable[[Tensor, Tensor], Tensor]
# (x [B, ...], log SNR [B], labels [B]) -> x0 [B, ...]
LabelDenoise = Callable[[Tensor, Tensor, Tensor], Tensor]
# () -> fresh standard normal noise of the shape of x
Noise = Callable[[], Tensor]


class SampleNoise:
    """Standard normal noise in which row k comes from seed k alone, whatever the batch, the process or the device."""

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], *, device: torch.device | str = "cpu") -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = tuple(shape), device

    def __call__(self) -> Tensor:
        """The next draw, float32 [B, *shape]."""
        rows = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return torch.stack(rows).to(self.device)


def euler(denoise: Denoise, x: Tensor, levels: Tensor) -> Tensor:
    """Euler steps in s."""
    for logsnr, s, s_next in _intervals(x, levels):
        x0 = denoise(x, logsnr)
        x = x0 + (s_next / s) * (x - x0)
    return x


def heun(denoise: Denoise, x: Tensor, levels: Tensor) -> Tensor:
    """Heun's second-order steps along the linear flow, the last one Euler's (Karras et al., 2022, algorithm 1).

    The flow's variables are t = s / (1 + s) and x_t = x / (1 + s), with slope eps - x0. Steps in s itself overshoot at
    the first levels, where s falls many times over; along the flow the slope is bounded at both ends.
    """
    intervals = list(_intervals(x, levels))
    for i, (logsnr, s, s_next) in enumerate(intervals):
        x0 = denoise(x, logsnr)
        x_euler = x0 + (s_next / s) * (x - x0)
        if i + 1 == len(intervals):
            return x_euler
        x0_next = denoise(x_euler, intervals[i + 1][0])
        slope, slope_next = (x - x0) / s - x0, (x_euler - x0_next) / s_next - x0_next
        t, t_next = s / (1 + s), s_next / (1 + s_next)
        x = (1 + s_next) * (x / (1 + s) + (t_next - t) * (slope + slope_next) / 2)
    return x


def ddim(denoise: Denoise, x: Tensor, levels: Tensor, *, noise: Noise, eta: float) -> Tensor:
    """DDIM (Song et al., 2021, equations 12 and 16) over alpha: eta 0 is Euler, eta 1 is ancestral sampling."""
    for logsnr, s, s_next in _intervals(x, levels):
        x0 = denoise(x, logsnr)
        fresh = eta * s_next * (1 - (s_next / s).square()).sqrt()
        x = x0 + (s_next.square() - fresh.square()).sqrt() / s * (x - x0)
        if eta > 0:
            x = x + fresh * noise().to(x)
    return x


ODE_SOLVERS: dict[str, Callable[[Denoise, Tensor, Tensor], Tensor]] = {
    "euler": euler,
    "heun":  heun,
}  # fmt: skip

SDE_SOLVERS: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim,
}


def solve(
    denoise: Denoise, noise: Noise, levels: Tensor, *, solver: str, eta: float = 0.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Clean latents [B, ...] in `dtype` from noise.

    Args:
        denoise: estimate of x0 from x = x0 + s eps.
        noise: its first draw is where the solver starts; a stochastic solver draws more.
        levels: [n] increasing log SNRs, as `solver_levels` gives them.
        solver: a row of ODE_SOLVERS or SDE_SOLVERS.
        eta: share of fresh noise in a stochastic solver, in [0, 1].

    Raises:
        ValueError: an unknown solver, or eta with a solver that adds no noise.
    """
    if solver not in {**ODE_SOLVERS, **SDE_SOLVERS}:
        known = ", ".join([*ODE_SOLVERS, *SDE_SOLVERS])
        raise ValueError(f"diffusion.sample.solver={solver!r} is unknown; choose one of {known}")
    if eta and solver in ODE_SOLVERS:
        raise ValueError(f"diffusion.sample.eta={eta} needs solver=ddim: {solver} adds no noise")
    x = noise().to(dtype)
    x = x * noise_to_signal(levels[0]).to(x)
    if solver in ODE_SOLVERS:
        return ODE_SOLVERS[solver](denoise, x, levels)
    return SDE_SOLVERS[solver](denoise, x, levels, noise=noise, eta=eta)


def guided(denoise: LabelDenoise, labels: Tensor, *, null: int, weight: float) -> Denoise:
    """Classifier-free guidance, x0 = u + w (c - u) (Ho & Salimans, 2022); weight 1 asks only the conditional network.

    `labels` is int64 [B]; `null` is the label that stands for none.
    """
    if weight == 1:
        return lambda x, logsnr: denoise(x, logsnr, labels)
    both = torch.cat([labels, torch.full_like(labels, null)])

    def combined(x: Tensor, logsnr: Tensor) -> Tensor:
        x0 = denoise(torch.cat([x, x]), torch.cat([logsnr, logsnr]), both)
        conditional, unconditional = x0.chunk(2)
        return unconditional + weight * (conditional - unconditional)

    return combined


def _intervals(x: Tensor, levels: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each level as log SNR [B] with the scalars s at both ends of its step; the last step ends at s = 0."""
    ratios = torch.cat([noise_to_signal(levels), levels.new_zeros(1)]).to(x)
    for i, logsnr in enumerate(levels.to(x)):
        yield logsnr.expand(len(x)), ratios[i], ratios[i + 1]
