"""What a diffusion model is trained for, as the section `diffusion.objective` says it. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Literal

from generator.checks import check_at_least, check_choices, check_finite

# Numbers of noises of each discretisation, s0 and s1, as published; constant has only the first.
PUBLISHED = {"constant": (20, 20), "doubling": (10, 1280), "sinusoidal": (20, 250)}
LEAST_SIGMA, LARGEST_SIGMA = 1e-4, 1e4  # of the noises over signal that networks tell apart
LEAST_SHARE = 1e-6  # of a log-normal that must lie between sigma_min and sigma_max, for the shares to have digits
# Keys of the section `diffusion` that say how a denoiser is trained, and mean nothing to a consistency model.
OF_DENOISING = ("path", "target", "weight", "schedule", "curriculum", "align")
# Steps of sampling that a consistency model can take: they know no training schedule, and start where they are told.
STEPS = ("cosine", "flow", "logsnr", "karras", "list")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    kind: Literal["denoising", "consistency"] = "denoising"
    """denoising: predict the clean latents of each noise level. consistency: map every level to the same end of its
    trajectory, so that one step samples. All other keys here are of consistency, which takes sample.solver=consistency,
    and no path, target, weight, schedule or curriculum."""
    discretisation: Literal["doubling", "constant", "sinusoidal"] = "doubling"
    """How many noises there are at a step. doubling: few at first, twice as many in each stage (Song & Dhariwal, 2024).
    constant: `least` throughout. sinusoidal: up from few to many and back (Gokmen et al., 2024)."""
    least: int | None = None
    """Noises at the first step, s0: 20 if absent, for doubling 10 and always one more."""
    most: int | None = None
    """Noises at most, s1: 250 if absent, for doubling 1280 and one more."""
    predefined: bool = False
    """Take the noises of every step from one grid, that of the most noises, so that a step whose number of noises is
    new meets none that the network has never seen. Otherwise each number has a grid of its own."""
    sigma_min: float = 0.002
    """The least noise over signal, where the model returns its input."""
    sigma_max: float = 80.0
    """The largest noise over signal, where sampling starts."""
    rho: float = 7.0
    """The noises are equally spaced in sigma^(1 / rho); larger ones put more of them where there is little noise."""
    noises: Literal["lognormal", "polynomial"] = "lognormal"
    """How often each noise is drawn: as often as a normal ln sigma falls there; or by a power of each sample's place in
    the batch, which draws large noises more often (Gokmen et al., 2024)."""
    mean: float = -1.1
    """Mean of ln sigma with noises=lognormal."""
    deviation: float = 2.0
    """Standard deviation of ln sigma with noises=lognormal."""
    curve: float = 4.0
    """Exponent of noises=polynomial; smaller ones draw more of the large noises."""
    huber: Literal["vector", "element"] = "vector"
    """Whether the pseudo-Huber distance is one of whole latents, or the mean over their numbers."""
    huber_scale: float = 0.00054
    """Distance, over the square root of how many numbers latents have, up to which it is quadratic."""

    def __post_init__(self) -> None:
        check_choices("diffusion.objective", self)
        check_finite("diffusion.objective", self)
        self._check_effect()
        least, most = self.span
        check_at_least("diffusion.objective.least", least, 2)
        if least > most:
            raise ValueError(f"diffusion.objective.least={least} must be at most diffusion.objective.most={most}")
        if not LEAST_SIGMA <= self.sigma_min < self.sigma_max <= LARGEST_SIGMA:
            raise ValueError(
                f"diffusion.objective.sigma_min={self.sigma_min} and sigma_max={self.sigma_max} must rise between"
                f" {LEAST_SIGMA:g} and {LARGEST_SIGMA:g}, beyond which networks tell no noises apart"
            )
        for name in ("rho", "deviation", "curve", "huber_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"diffusion.objective.{name}={getattr(self, name)} must be positive")
        if self.discretisation == "sinusoidal" and self.rho <= 1:
            raise ValueError(
                f"diffusion.objective.rho={self.rho} must be above 1 with discretisation=sinusoidal, whose number of"
                " noises moves by the power (rho - 1) / 4 of the progress"
            )
        self._check_shares()

    def _check_effect(self) -> None:
        """Raise ValueError if a key is set that the other choices leave without effect."""
        changed = {each.name for each in fields(self) if getattr(self, each.name) != each.default}
        reader = {name: "kind=consistency" for name in changed if self.kind == "denoising"}
        if self.kind == "consistency":
            for name, choice in (("mean", "lognormal"), ("deviation", "lognormal"), ("curve", "polynomial")):
                if name in changed and self.noises != choice:
                    reader[name] = f"noises={choice}"
            for name in {"most", "predefined"} & changed if self.discretisation == "constant" else ():
                reader[name] = "discretisation=doubling or sinusoidal"
        for name in sorted(reader):
            raise ValueError(
                f"diffusion.objective.{name}={getattr(self, name)} has no effect here: it needs"
                f" diffusion.objective.{reader[name]}"
            )

    def _check_shares(self) -> None:
        """Raise ValueError if the normal ln sigma of noises=lognormal hardly ever falls between both ends."""
        ends = (math.log(sigma) - self.mean for sigma in (self.sigma_min, self.sigma_max))
        low, high = (math.erf(end / (math.sqrt(2) * self.deviation)) for end in ends)
        if self.noises == "lognormal" and not (high - low) / 2 > LEAST_SHARE:
            raise ValueError(
                f"diffusion.objective.mean={self.mean} with deviation={self.deviation} draws no noises between"
                f" sigma_min={self.sigma_min} and sigma_max={self.sigma_max}: mean is one of ln sigma"
            )

    @property
    def span(self) -> tuple[int, int]:
        """s0 and s1, those of the discretisation where they are absent."""
        least, most = PUBLISHED[self.discretisation]
        least = least if self.least is None else self.least
        if self.discretisation == "constant":
            return least, least
        return least, most if self.most is None else self.most

    @property
    def largest(self) -> int:
        """The most noises that any step can have."""
        return self.span[1] + (self.discretisation == "doubling")

    @property
    def levels(self) -> tuple[float, float]:
        """The log SNRs of sigma_max and sigma_min."""
        return -2 * math.log(self.sigma_max), -2 * math.log(self.sigma_min)


def check_objective(diffusion: Any) -> None:
    """Raise ValueError unless all of a section `diffusion` goes with the objective in it."""
    objective = diffusion.objective
    check_sampling(objective, diffusion.sample)
    if objective.kind == "denoising":
        return
    for each in fields(diffusion):
        if each.name in OF_DENOISING and getattr(diffusion, each.name) != _default(each):
            raise ValueError(
                f"diffusion.{each.name} has no effect with diffusion.objective.kind=consistency, whose noises, target"
                " and weight are those of diffusion.objective: leave it out"
            )


def check_sampling(objective: ObjectiveConfig, sample: Any) -> None:
    """Raise ValueError unless a section `diffusion.sample` fits what the network is trained for."""
    if objective.kind == "denoising":
        if sample.solver == "consistency":
            raise ValueError(
                "diffusion.sample.solver=consistency asks for a model that was trained with"
                " diffusion.objective.kind=consistency, and this one is not: choose another solver, such as ddim"
            )
        return
    if sample.solver != "consistency":
        raise ValueError(
            f"diffusion.sample.solver={sample.solver} follows a denoiser, and this is a consistency model"
            " (diffusion.objective.kind): set diffusion.sample.solver=consistency"
        )
    if sample.steps not in STEPS:
        raise ValueError(
            f"diffusion.sample.steps={sample.steps} is of denoisers, and this is a consistency model"
            f" (diffusion.objective.kind): choose one of {', '.join(STEPS)}"
        )
    if sample.from_zero_snr:
        raise ValueError(
            "diffusion.sample.from_zero_snr=True starts without any signal, but a consistency model is trained up to"
            f" sigma_max={objective.sigma_max}: leave it out"
        )
    low, high = objective.levels
    for name, level in [("levels", level) for level in sample.levels] or [
        ("first_logsnr", first_level(objective, sample))
    ]:
        if not low <= level <= high:
            raise ValueError(
                f"diffusion.sample.{name}={level} must lie in [{low:.6g}, {high:.6g}], the log SNRs of sigma_max and"
                " sigma_min of diffusion.objective; without first_logsnr sampling starts at sigma_max"
            )


def check_last(objective: ObjectiveConfig, sample: Any, last: float) -> None:
    """Raise ValueError if the last log SNR that a solver asks is one where a consistency model returns its input."""
    if objective.kind == "consistency" and last > objective.levels[1] + 1e-9:
        raise ValueError(
            f"diffusion.sample.steps={sample.steps} with num_steps={sample.num_steps} goes up to log SNR {last:.6g},"
            f" but beyond {objective.levels[1]:.6g}, that of sigma_min={objective.sigma_min}, a consistency model"
            " returns what it is given: lower num_steps or last_logsnr"
        )


def first_level(objective: ObjectiveConfig, sample: Any) -> float:
    """Log SNR where sampling starts: of a consistency model at sigma_max, where first_logsnr has its default."""
    standard = next(each.default for each in fields(sample) if each.name == "first_logsnr")
    if objective.kind == "consistency" and sample.first_logsnr == standard:
        return objective.levels[0]
    return sample.first_logsnr


def _default(each: Field[Any]) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()
