"""How the steps of a solver are optimised, as the section `diffusion.align` says it. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from generator.checks import check_at_least, check_choices, check_finite, check_scale


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    num_images: int = 1024
    """Training latents that the bound is estimated on, each with one noise, which all candidates share. Time is in
    proportion."""
    num_steps: int = 10
    """Steps of the schedule that is optimised first, its levels all at once."""
    subdivisions: int = 2
    """How often every step is then halved and the new levels optimised: 2 makes 40 steps of 10."""
    start: Literal["karras", "logsnr", "cosine"] = "cosine"
    """The schedule to begin with, as sample.steps: the paper took even times for models such as latent diffusion, and
    Karras steps for those of EDM."""
    first_logsnr: float | None = None
    """Log SNR at which sampling starts; absent: that of `sample`."""
    last_logsnr: float = 7.0
    """Log SNR at which the last step ends for the bound; a solver goes on to clean latents. That of `sample` will not
    do: the bound counts noise t by t^-3, so that an end at 10 draws the levels to noise that no decoder shows. 7 is
    noise 0.03, at which the paper ended Stable Diffusion, whose latents have unit deviation like these."""
    candidates: int = 11
    """Places that are tried for a level in turn, its own among them: an odd number."""
    max_sweeps: int = 30
    """Times that all levels of a schedule are gone through, at most; the descent ends sooner once a sweep lowers the
    bound by less than a thousandth."""
    sigma_data: float = 1.0
    """Deviation of the latents, for the importance sampling of noise levels: it changes the variance of the estimate
    alone. Tokenizers normalise it to 1 (the paper's data had 0.5)."""
    probe_images: int = 500
    """Samples whose Frechet distance to training images stops the first descent and picks its schedule, as the bound
    itself goes on to schedules that are useless; 0 descends to the end without them."""
    probe_features: str = "random"
    """Judge of these samples, as an entry of eval.features; a classifier is trained too late to be one."""
    patience: int = 3
    """Sweeps that the first descent bears without a better distance."""

    def __post_init__(self) -> None:
        key = "diffusion.align"
        check_choices(key, self)
        check_finite(key, self)
        for name, least in (("num_images", 1), ("num_steps", 2), ("subdivisions", 0), ("candidates", 3)):
            check_at_least(f"{key}.{name}", getattr(self, name), least)
        for name, least in (("max_sweeps", 1), ("probe_images", 0), ("patience", 1)):
            check_at_least(f"{key}.{name}", getattr(self, name), least)
        check_scale(f"{key}.sigma_data", self.sigma_data)
        if self.candidates % 2 == 0:
            raise ValueError(
                f"{key}.candidates={self.candidates} must be odd: the level itself, and as many on either side of it"
            )
        if 0 < self.probe_images < 20:
            raise ValueError(f"{key}.probe_images={self.probe_images} are too few for a distance: take 20, or 0")
        if self.probe_features == "classifier":
            raise ValueError(
                f"{key}.probe_features=classifier is trained for the scores alone: name another entry of eval.features,"
                " such as random"
            )
        self._check_unused()

    def ends(self, sample: Any) -> tuple[float, float]:
        """Log SNRs of the first level and of the end of the last step, for a section `diffusion.sample`."""
        return sample.first_logsnr if self.first_logsnr is None else self.first_logsnr, self.last_logsnr

    def _check_unused(self) -> None:
        if self.probe_images:
            return
        for name in ("probe_features", "patience"):
            value = getattr(self, name)
            if value != getattr(AlignConfig, name):
                raise ValueError(
                    f"diffusion.align.{name}={value} has no effect with probe_images=0: nothing is probed; leave it out"
                )


def check_align(diffusion: Any) -> None:
    """Raise ValueError if a section `diffusion` leaves the optimisation of its steps no room, or no meaning."""
    align, schedule = diffusion.align, diffusion.schedule
    first, last = align.ends(diffusion.sample)
    if not first < last:
        raise ValueError(
            f"diffusion.align.first_logsnr={first} must lie below last_logsnr={last}; where the first is absent, it is"
            " that of diffusion.sample"
        )
    _check_start(align, first)
    if schedule.kind == "learned" and schedule.learned.per != "scalar":
        raise ValueError(
            "diffusion.align finds one level after the other for whole images, but with schedule.learned.per="
            f"{schedule.learned.per} every {schedule.learned.per} has its own: leave align out, or use per=scalar"
        )


def _check_start(align: AlignConfig, first: float) -> None:
    """Raise ValueError if steps even in cosine time, which have no end of their own, stop beyond that of the last."""
    if align.start != "cosine":
        return
    highest = -2 * math.log(math.tan(math.atan2(1, math.exp(first / 2)) / align.num_steps))
    if not highest < align.last_logsnr:
        raise ValueError(
            f"diffusion.align.start=cosine stops at log SNR {highest:.6g} with num_steps={align.num_steps}, not below"
            f" last_logsnr={align.last_logsnr}: raise last_logsnr, lower num_steps, or use start=karras"
        )
