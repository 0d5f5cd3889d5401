"""Settings of the generators that would do harm, or nothing, are refused with key, value and remedy."""

from __future__ import annotations

import math
import typing
from dataclasses import fields
from typing import Any

import pytest

from engine.config import TrainConfig
from generator.config import (
    CURRICULUM_KEYS,
    STAGED,
    CurriculumConfig,
    DiffusionConfig,
    DiffusionSampleConfig,
    MixedScheduleConfig,
    ScheduleConfig,
)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        (ScheduleConfig, "location"),
        (ScheduleConfig, "scale"),
        (MixedScheduleConfig, "location"),
        (CurriculumConfig, "start"),
        (CurriculumConfig, "end"),
        (CurriculumConfig, "smoothing"),
        (CurriculumConfig, "ratio"),
        (CurriculumConfig, "threshold"),
        (CurriculumConfig, "min_improvement"),
        (DiffusionSampleConfig, "first_logsnr"),
        (DiffusionSampleConfig, "last_logsnr"),
        (DiffusionSampleConfig, "guidance"),
        (DiffusionSampleConfig, "guidance_last"),
        (DiffusionConfig, "sigma_data"),
        (DiffusionConfig, "weight_gamma"),
    ],
)
def test_numbers_are_finite(section: Any, key: str) -> None:
    """YAML has .nan and .inf."""
    for value in (math.nan, math.inf, -math.inf):
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


KINDS = typing.get_args(typing.get_type_hints(CurriculumConfig)["kind"])
OTHER_VALUES: dict[str, Any] = {
    "pacing": "fixed", "patience": 7, "smoothing": 0.5, "min_improvement": 0.1, "stage_steps": 9,
    "threshold": 0.4, "ratio": 3.0, "cluster": 2, "start": 1.0, "end": 1.0,
}  # fmt: skip


def test_every_key_of_a_curriculum_is_known_to_be_read() -> None:
    """By all kinds, or by those of the table."""
    keys = [each.name for each in fields(CurriculumConfig)]
    assert keys == ["kind", "num_clusters", "clusters", *CURRICULUM_KEYS] and set(CURRICULUM_KEYS) == set(OTHER_VALUES)
    assert {kind for kinds in CURRICULUM_KEYS.values() for kind in kinds} | {"uniform"} == set(KINDS)


@pytest.mark.parametrize("key", CURRICULUM_KEYS)
def test_a_key_of_another_curriculum_is_refused(key: str) -> None:
    settings: dict[str, Any] = {key: OTHER_VALUES[key]} | ({"stage_steps": 5} if key == "pacing" else {})
    readers = CURRICULUM_KEYS[key]
    for kind in readers:
        assert getattr(CurriculumConfig(kind=kind, **settings), key) == OTHER_VALUES[key]
    for kind in set(KINDS) - set(readers):
        told = rf"has no effect with kind={kind}: set diffusion\.curriculum\.kind={readers[0]}"
        with pytest.raises(ValueError, match=rf"{key}={OTHER_VALUES[key]} {told}"):
            CurriculumConfig(kind=kind, **settings)


@pytest.mark.parametrize("key", ["patience", "smoothing", "min_improvement"])
def test_a_key_of_patience_is_refused_with_fixed_stages(key: str) -> None:
    with pytest.raises(
        ValueError, match=rf"{key}={OTHER_VALUES[key]} has no effect with pacing=fixed: set .*=patience"
    ):
        CurriculumConfig(kind="anti", pacing="fixed", stage_steps=5, **{key: OTHER_VALUES[key]})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "harder"}, r"kind='harder' must be one of uniform, easy_to_hard, anti"),
        ({"clusters": "snr"}, r"clusters='snr' must be one of time, logsnr, noise_level"),
        ({"kind": "anti", "pacing": "slow"}, r"pacing='slow' must be one of patience, fixed"),
        ({"num_clusters": 0}, r"num_clusters=0 must be at least 1"),
        ({"num_clusters": 101}, r"num_clusters=101 must be at most 100"),
        ({"kind": "single", "cluster": 0}, r"cluster=0 must be one of 1 \.\. 20"),
        ({"kind": "single", "cluster": 6, "num_clusters": 5}, r"cluster=6 must be one of 1 \.\. 5 \(num_clusters\)"),
        ({"kind": "anti", "patience": -1}, r"patience=-1 must be at least 0"),
        ({"kind": "anti", "min_improvement": -0.1}, r"min_improvement=-0\.1 must be at least 0"),
        ({"kind": "anti", "smoothing": 1.0}, r"smoothing=1\.0 must lie in \[0, 1\); 0 is the raw loss"),
        ({"kind": "anti", "smoothing": -0.1}, r"smoothing=-0\.1 must lie in \[0, 1\)"),
        ({"kind": "anti", "stage_steps": 0}, r"stage_steps=0 must be at least 1"),
        ({"kind": "anti", "pacing": "fixed"}, r"pacing=fixed needs diffusion\.curriculum\.stage_steps"),
        ({"kind": "asymmetric", "threshold": 0.0}, r"threshold=0\.0 must lie between 0 and 1"),
        ({"kind": "asymmetric", "threshold": 1.0}, r"threshold=1\.0 must lie between 0 and 1"),
        ({"kind": "asymmetric", "ratio": 0.0}, r"ratio=0\.0 must be positive: above 1"),
    ],
)
def test_what_no_curriculum_can_be_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=rf"^diffusion\.curriculum\.{said}"):
        CurriculumConfig(**settings)


@pytest.mark.parametrize("kind", STAGED)
@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"num_clusters": 5, "patience": 3}, 20),
        ({"num_clusters": 5, "patience": 3, "stage_steps": 4}, 16),
        ({"num_clusters": 3, "pacing": "fixed", "stage_steps": 10}, 20),
        ({"num_clusters": 1}, 0),
    ],
)
def test_a_training_too_short_for_the_last_stage_is_refused(kind: Any, settings: dict[str, Any], least: int) -> None:
    curriculum = CurriculumConfig(kind=kind, **settings)
    assert curriculum.least_steps == least
    DiffusionConfig(curriculum=curriculum, train=TrainConfig(steps=least + 1))
    if least:
        said = rf"needs at least {least} steps .*train\.steps={least}: lower patience, stage_steps or num_clusters"
        with pytest.raises(ValueError, match=said):
            DiffusionConfig(curriculum=curriculum, train=TrainConfig(steps=least))


def test_other_curricula_train_for_as_little_as_one_step() -> None:
    for kind in set(KINDS) - set(STAGED):
        DiffusionConfig(curriculum=CurriculumConfig(kind=kind), train=TrainConfig(steps=1))


def test_what_lies_outside_needs_a_network_of_one_cluster() -> None:
    sample = DiffusionSampleConfig(outside="elsewhere")
    with pytest.raises(ValueError, match=r"sample\.outside='elsewhere' has no effect with curriculum\.kind=uniform"):
        DiffusionConfig(sample=sample)
    DiffusionConfig(sample=sample, curriculum=CurriculumConfig(kind="single"))


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
