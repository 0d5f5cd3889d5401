"""Solvers: from noise to data with any `denoise(z, logsnr) -> x0`.

The state is z = alpha x0 + sigma eps in variance-preserving coordinates, whatever path the network was trained on.
Levels come in increasing log SNR, lambda = ln(alpha^2 / sigma^2). The first may be -inf, where z is noise alone; the
step after the last one goes to x0 itself. Coefficients are float64; the state is float32, or float64 if z is.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from generator.path import variance_preserving

# (z [B, ...], log SNR [B], the same in all rows) -> x0 [B, ...]
Denoise = Callable[[Tensor, Tensor], Tensor]
# () -> fresh standard normal noise of the shape of z
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


@dataclass(frozen=True)
class Level:
    """A noise level with its variance-preserving coefficients."""

    logsnr: float
    alpha: float
    sigma: float

    @property
    def time(self) -> float:
        """Of the linear flow: t = sigma / (alpha + sigma)."""
        return self.sigma / (self.alpha + self.sigma)

    @property
    def scale(self) -> float:
        """z over the linear flow's x_t = (1 - t) x0 + t eps."""
        return self.alpha + self.sigma


CLEAN = Level(math.inf, 1.0, 0.0)


def ddim(denoise: Denoise, z: Tensor, levels: Tensor, *, noise: Noise, eta: float) -> Tensor:
    """DDIM (Song et al., 2021, equations 12 and 16): eta is the share of fresh noise, 0 is the deterministic solver.

    With eta 0 it is Euler's method for the probability-flow ODE dx/ds = (x - x0) / s in x = z / alpha, s = sigma /
    alpha (Karras et al., 2022).
    """
    for here, there in _intervals(levels):
        z = _renoised(z, _ask(denoise, z, here), here, there, eta=eta, noise=noise)
    return z


def ddpm(denoise: Denoise, z: Tensor, levels: Tensor, *, noise: Noise) -> Tensor:
    """Ancestral sampling: each step draws from q(z' | z, x0) (Ho et al., 2020, equation 7, the smaller variance).

    The levels may lie any distance apart; the posterior between two of them is DDIM's step with eta 1.
    """
    return ddim(denoise, z, levels, noise=noise, eta=1.0)


def euler(denoise: Denoise, z: Tensor, levels: Tensor) -> Tensor:
    """Euler's steps along the linear flow, dx_t/dt = eps - x0 on x_t = (1 - t) x0 + t eps.

    Exact arithmetic makes each step DDIM's with eta 0: x_t + (t' - t) (eps - x0) = (1 - t') x0 + t' eps.
    """
    for here, there in _intervals(levels):
        z = _flowed(z, _move(denoise, z, here, there.time - here.time), here, there)
    return z


def heun(denoise: Denoise, z: Tensor, levels: Tensor) -> Tensor:
    """Heun's second-order steps along the linear flow, the last one Euler's (Karras et al., 2022, algorithm 1).

    Karras et al. step in s = sigma / alpha. There the first steps overshoot, as s falls many times over in each; the
    flow's slope eps - x0 is bounded at both ends.
    """
    for here, there in _intervals(levels):
        gap = there.time - here.time
        move = _move(denoise, z, here, gap)
        guess = _flowed(z, move, here, there)
        if there is not CLEAN:
            guess = _flowed(z, (move + _move(denoise, guess, there, gap)) / 2, here, there)
        z = guess
    return z


def dpmpp_2m(denoise: Denoise, z: Tensor, levels: Tensor) -> Tensor:
    """DPM-Solver++(2M) (Lu et al., 2022, algorithm 2): second order with one network call a step."""
    return _multistep(denoise, z, levels, noise=None)


def sde_dpmpp_2m(denoise: Denoise, z: Tensor, levels: Tensor, *, noise: Noise) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al., 2022): the multistep solver of the reverse SDE."""
    return _multistep(denoise, z, levels, noise=noise)


def euler_maruyama(denoise: Denoise, z: Tensor, levels: Tensor, *, noise: Noise) -> Tensor:
    """Euler-Maruyama along the linear flow's reverse SDE (Ma et al., 2024, SiT) with diffusion w(t) = 2 t.

    Backwards in t, dx = (v - w/2 score) dt + sqrt(w) dW with v = eps - x0 and score = -eps / t, so that the drift is
    2 eps - x0, bounded at both ends. SiT calls this w "sigma" (its code counts w / 2). As with all solvers here the
    last step goes to x0; that is SiT's last step "Euler". Steps must be short in t: their error is of first order.
    """
    for here, there in _intervals(levels):
        x0 = _ask(denoise, z, here)
        if there is CLEAN:
            return x0
        gap, x_t = here.time - there.time, z / here.scale
        move = 2 * gap / here.time * (x_t - x0) + gap * x0  # gap (2 eps - x0), as eps = (x_t - x0) / t + x0
        z = there.scale * (x_t - move + math.sqrt(2 * here.time * gap) * noise().to(z))
    return z


def consistency(denoise: Denoise, z: Tensor, levels: Tensor, *, noise: Noise, rest: float = 0.0) -> Tensor:
    """Multi-step sampling of a consistency model (Song et al., 2023, algorithm 1): to the end, and back with new noise.

    x' = f(x) + sqrt(s'^2 - rest^2) n in x = z / alpha, where `rest` is the noise s at which the model's trajectories
    end, and which f(x) still carries.
    """
    for here, there in _intervals(levels):
        x0 = _ask(denoise, z, here)
        if there is CLEAN:
            return x0
        fresh = math.sqrt(max(there.sigma**2 - (rest * there.alpha) ** 2, 0.0))
        z = there.alpha * x0 + fresh * noise().to(z)
    return z


ODE_SOLVERS: dict[str, Callable[[Denoise, Tensor, Tensor], Tensor]] = {
    "euler":    euler,
    "heun":     heun,
    "dpmpp_2m": dpmpp_2m,
}  # fmt: skip

SDE_SOLVERS: dict[str, Callable[..., Tensor]] = {
    "ddpm":           ddpm,
    "ddim":           ddim,
    "sde_dpmpp_2m":   sde_dpmpp_2m,
    "euler_maruyama": euler_maruyama,
}  # fmt: skip

# Of consistency models, whose `denoise` gives the end of the trajectory.
CONSISTENCY_SOLVERS: dict[str, Callable[..., Tensor]] = {"consistency": consistency}


def solve(
    denoise: Denoise,
    noise: Noise,
    levels: Tensor,
    *,
    solver: str,
    eta: float = 0.0,
    rest: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Clean latents [B, ...] in `dtype` from noise.

    Args:
        denoise: estimate of x0 from z = alpha x0 + sigma eps.
        noise: its first draw is the z at which a solver starts (data have unit variance); a stochastic one draws more.
        levels: [n] increasing log SNRs, as `solver_levels` gives them.
        solver: a row of ODE_SOLVERS, SDE_SOLVERS or CONSISTENCY_SOLVERS.
        eta: share of fresh noise in ddim, in [0, 1].
        rest: noise over signal that the x0 of `denoise` still carries; of solver consistency.

    Raises:
        ValueError: an unknown solver, or eta with another solver than ddim.
    """
    if solver not in {**ODE_SOLVERS, **SDE_SOLVERS, **CONSISTENCY_SOLVERS}:
        known = ", ".join([*ODE_SOLVERS, *SDE_SOLVERS, *CONSISTENCY_SOLVERS])
        raise ValueError(f"diffusion.sample.solver={solver!r} is unknown; choose one of {known}")
    if eta and solver != "ddim":
        raise ValueError(f"diffusion.sample.eta={eta} needs solver=ddim: {solver} has no eta")
    z = noise().to(dtype)
    if solver in ODE_SOLVERS:
        return ODE_SOLVERS[solver](denoise, z, levels)
    if solver in CONSISTENCY_SOLVERS:
        return CONSISTENCY_SOLVERS[solver](denoise, z, levels, noise=noise, rest=rest)
    step = functools.partial(ddim, eta=eta) if solver == "ddim" else SDE_SOLVERS[solver]
    return step(denoise, z, levels, noise=noise)


def _intervals(levels: Tensor) -> list[tuple[Level, Level]]:
    """Both ends of every step; the last step ends at clean data."""
    alpha, sigma = variance_preserving(levels.double())
    stops = [Level(*numbers) for numbers in zip(levels.tolist(), alpha.tolist(), sigma.tolist(), strict=True)]
    return list(itertools.pairwise([*stops, CLEAN]))


def _ask(denoise: Denoise, z: Tensor, here: Level) -> Tensor:
    return denoise(z, z.new_full((len(z),), here.logsnr))


def _move(denoise: Denoise, z: Tensor, here: Level, gap: float) -> Tensor:
    """How far x_t goes in a time `gap` at the linear flow's slope at z, dx_t/dt = eps - x0 = (x_t - x0) / t.

    Quotients of times come first: where there is hardly any noise eps alone lies beyond float32.
    """
    return (gap / here.time) * (z / here.scale - _ask(denoise, z, here))


def _flowed(z: Tensor, move: Tensor, here: Level, there: Level) -> Tensor:
    """From z at one level to z at the next, by a move of the linear flow's x_t."""
    return there.scale * (z / here.scale + move)


def _renoised(
    z: Tensor, x0: Tensor, here: Level, there: Level, *, eta: float = 0.0, noise: Noise | None = None
) -> Tensor:
    """z at the next level if x0 is right: alpha' x0 + sigma' e.

    e has unit variance: it is the eps = (z - alpha x0) / sigma of z, of which fresh noise replaces a part w, e =
    sqrt(1 - w^2) eps + w n with w = eta sqrt(1 - e^(lambda - lambda')).
    """
    w = eta * math.sqrt(-math.expm1(here.logsnr - there.logsnr))
    z = there.alpha * x0 + math.sqrt(1 - w * w) * there.sigma / here.sigma * (z - here.alpha * x0)
    return z if noise is None or not w or there is CLEAN else z + w * there.sigma * noise().to(z)


def _multistep(denoise: Denoise, z: Tensor, levels: Tensor, *, noise: Noise | None) -> Tensor:
    """DPM-Solver++(2M): DDIM's steps, with eta 1 if there is noise, by an x0 extrapolated to the middle of the step.

    Written out, a step without noise is z' = (sigma' / sigma) z - alpha' (e^(-h/2) - 1) D with h = lambda' - lambda
    and D = x0 + (h / (2 h_before)) (x0 - x0_before). The first step has nothing to extrapolate from, and the step to
    clean data is infinitely long: both are of first order.
    """
    before: tuple[Level, Tensor] | None = None
    for here, there in _intervals(levels):
        x0 = guess = _ask(denoise, z, here)
        if before is not None and there is not CLEAN:
            ratio = (there.logsnr - here.logsnr) / (here.logsnr - before[0].logsnr)  # 0 after a start at -inf
            guess = x0 + ratio / 2 * (x0 - before[1])
        z = _renoised(z, guess, here, there, eta=0.0 if noise is None else 1.0, noise=noise)
        before = here, x0
    return z
