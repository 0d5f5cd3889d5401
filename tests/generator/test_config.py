"""Settings of the generators that would do harm, or nothing, are refused with key, value and remedy."""

from __future__ import annotations

import math
from typing import Any

import pytest

from generator.config import (
    CurriculumConfig,
    DiffusionConfig,
    DiffusionSampleConfig,
    MixedScheduleConfig,
    ScheduleConfig,
)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("section", "key"),
    [
        (ScheduleConfig, "location"),
        (ScheduleConfig, "scale"),
        (MixedScheduleConfig, "location"),
        (CurriculumConfig, "start"),
        (CurriculumConfig, "end"),
        (DiffusionSampleConfig, "first_logsnr"),
        (DiffusionSampleConfig, "last_logsnr"),
        (DiffusionSampleConfig, "guidance"),
        (DiffusionSampleConfig, "guidance_last"),
        (DiffusionConfig, "sigma_data"),
        (DiffusionConfig, "weight_gamma"),
    ],
)
def test_numbers_are_finite(section: Any, key: str, value: float) -> None:
    """YAML has .nan and .inf."""
    with pytest.raises(ValueError, match=rf"diffusion\..*{key}={value} must be finite"):
        section(**{key: value})


def test_listed_levels_are_finite() -> None:
    with pytest.raises(ValueError, match=r"levels=\(-inf, 0\.0\) must be finite; from_zero_snr=true starts without"):
        DiffusionSampleConfig(steps="list", levels=(-math.inf, 0.0))


@pytest.mark.parametrize(
    ("settings", "useful"),
    [
        ({"sigma_data": 0.5}, [{"path": "ve"}, {"target": "F"}, {"weight": "edm"}]),
        ({"weight_gamma": 2.0}, [{"weight": "min_snr"}, {"weight": "soft_min_snr"}, {"weight": "p2"}]),
    ],
)
def test_a_number_that_changes_nothing_is_refused(settings: dict[str, Any], useful: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=rf"diffusion\.{next(iter(settings))}=.* has no effect with"):
        DiffusionConfig(**settings)
    for beside in useful:
        DiffusionConfig(**settings, **beside)


def test_a_shift_of_the_schedule_needs_the_curriculum_that_shifts() -> None:
    for key in ("start", "end"):
        with pytest.raises(ValueError, match=rf"curriculum\.{key}=1\.0 has no effect with kind=uniform: set"):
            CurriculumConfig(**{key: 1.0})
        CurriculumConfig(kind="progressive", **{key: 1.0})  # type: ignore[arg-type]


def test_rho_needs_karras() -> None:
    with pytest.raises(ValueError, match=r"diffusion\.sample\.rho=3\.0 has no effect with steps=cosine"):
        DiffusionSampleConfig(rho=3.0)
    DiffusionSampleConfig(rho=3.0, steps="karras")


@pytest.mark.parametrize(("path", "target"), [("vp", "eps"), ("ve", "eps"), ("ve", "velocity")])
def test_noise_as_target_says_nothing_where_there_is_nothing_else(path: Any, target: Any) -> None:
    terminal, start = ScheduleConfig(kind="ddpm", zero_terminal=True), DiffusionSampleConfig(from_zero_snr=True)
    with pytest.raises(ValueError, match=rf"\.zero_terminal=True with target={target}, path={path}: .*target=v"):
        DiffusionConfig(path=path, target=target, schedule=terminal)
    with pytest.raises(ValueError, match=rf"\.from_zero_snr=True with target={target}, path={path}: .*target=v"):
        DiffusionConfig(path=path, target=target, sample=start)
    DiffusionConfig(path="flow", target="velocity", schedule=terminal, sample=start)
