"""The learned noise schedule, as the section `diffusion.schedule.learned` says it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from generator.checks import check_at_least, check_choices, check_finite

MAP_SOLVERS = ("ddpm", "ddim")  # whose steps go number by number
CURRICULA = ("uniform", "easy_to_hard", "anti")  # which need nothing of a schedule but its time


@dataclass(frozen=True, kw_only=True)
class LearnedScheduleConfig:
    per: Literal["pixel", "channel", "scalar"] = "scalar"
    """What has a schedule of its own: every pixel of every channel, computed from the image that the generator is told;
    every channel, computed from it too if there is one; or nothing, one for all."""
    hidden: int = 64
    """Sigmoids in each of the two monotone functions of time; 1,024 in the paper's code."""
    channels: int = 32
    """Channels of the convolutions that compute the rates of pixels or channels from an image."""
    learning_rate_factor: float = 10.0
    """Learning rate of the functions of time, over that of the network: a few numbers with a longer way to go."""
    margin: float = 0.005
    """Distance in time from both ends at which gamma is held at 1 and at 0: one of the paper's 200 steps."""
    constraint: float = 2.0
    """Weight of gamma' = -beta gamma and of both ends, beside the error of the prediction."""
    prior: float = 2.0
    """Weight of the divergence of pure noise from what is left of the latents at the end."""
    regularisation: float = 0.002
    """Weight of gamma''^2, without which all noise comes at once; 2 x 0.001 in the paper's code."""

    def __post_init__(self) -> None:
        key = "diffusion.schedule.learned"
        check_choices(key, self)
        check_finite(key, self)
        for name in ("hidden", "channels"):
            check_at_least(f"{key}.{name}", getattr(self, name), 1)
        for name in ("constraint", "prior", "regularisation"):
            check_at_least(f"{key}.{name}", getattr(self, name), 0)
        if not self.learning_rate_factor > 0:
            raise ValueError(f"{key}.learning_rate_factor={self.learning_rate_factor} must be positive")
        if not 0 < self.margin < 0.5:
            raise ValueError(f"{key}.margin={self.margin} must lie between 0 and 0.5")
        if self.channels != 32 and self.per == "scalar":
            raise ValueError(f"{key}.channels={self.channels} has no effect with per=scalar, which reads no image")


def check_learned(config: Any) -> None:
    """Raise ValueError if a section `diffusion` combines its learned schedule with what cannot go with one."""
    learned, curriculum = config.schedule.learned, config.curriculum
    if config.weight != "plain":
        raise ValueError(
            f"diffusion.weight={config.weight} with schedule.kind=learned, which would move to where errors count"
            " little: use weight=plain"
        )
    if curriculum.kind not in CURRICULA or curriculum.clusters != "time":
        raise ValueError(
            f"diffusion.curriculum.kind={curriculum.kind}, clusters={curriculum.clusters} with schedule.kind=learned,"
            f" whose log SNRs move: use kind={' or '.join(CURRICULA)}, and clusters=time"
        )
    if learned.per == "pixel" and config.condition.kind != "image":
        raise ValueError(
            "diffusion.schedule.learned.per=pixel computes the schedule of every pixel from an image, but"
            f" condition.kind={config.condition.kind}: set diffusion.condition.kind=image, or per=channel"
        )
    if learned.channels != 32 and config.condition.kind != "image":
        raise ValueError(
            f"diffusion.schedule.learned.channels={learned.channels} has no effect with condition.kind="
            f"{config.condition.kind}: it is of schedules that read an image"
        )
    if learned.per != "scalar":
        check_map_sampling(learned.per, config.sample)


def check_map_sampling(per: str, sample: Any) -> None:
    """Raise ValueError unless a section `diffusion.sample` suits levels that differ within an image.

    Between such levels there is nothing but time to count steps in.
    """
    key, maps = "diffusion.sample", f"schedule.learned.per={per}, where every {per} has levels of its own"
    if sample.solver not in MAP_SOLVERS:
        raise ValueError(
            f"{key}.solver={sample.solver} knows one level for all: {maps}, needs {', '.join(MAP_SOLVERS)}"
        )
    if sample.steps != "time":
        raise ValueError(f"{key}.steps={sample.steps} with {maps}: use steps=time")
    for name, idle in (
        ("first_logsnr", -10.0), ("from_zero_snr", False), ("guidance_first", None), ("guidance_last", None),
        ("guide", None),
    ):  # fmt: skip
        if getattr(sample, name) != idle:
            raise ValueError(f"{key}.{name}={getattr(sample, name)} has no meaning with {maps}: leave it out")
