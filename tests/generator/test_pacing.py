"""Pacing: a stage ends when the loss says so, and not a step earlier or later."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from generator.config import CurriculumConfig
from generator.pacing import Pacing


def build(num_stages: int = 4, **settings: Any) -> Pacing:
    settings = {"kind": "easy_to_hard", "num_clusters": num_stages, **settings}
    return Pacing(CurriculumConfig(**settings), num_stages=num_stages)


def stages(pacing: Pacing, losses: Iterable[float]) -> list[int]:
    """The stage in which each step was taken."""
    taken = []
    for loss in losses:
        taken.append(pacing.stage)
        begun = pacing.update(loss)
        assert begun == (pacing.stage == taken[-1] + 1) and begun == (pacing.stage != taken[-1])
    return taken


@pytest.mark.parametrize("patience", [0, 1, 5, 200])
def test_a_stage_ends_after_patience_and_one_more_steps_without_improvement(patience: int) -> None:
    pacing = build(patience=patience, smoothing=0.0)
    falling = [3.0, 2.0, 1.0]
    assert stages(pacing, falling + [1.0] * patience) == [1] * (3 + patience)
    assert pacing.stage == 1
    assert pacing.update(1.0) and pacing.stage == 2


@pytest.mark.parametrize("smoothing", [0.0, 0.9, 0.99, 0.999])
def test_a_loss_that_stays_equal_is_never_an_improvement(smoothing: float) -> None:
    """Nor is the rounding of its average."""
    for loss in torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist():
        pacing = build(patience=40, smoothing=smoothing)
        assert stages(pacing, [loss] * 130) == [1] * 42 + [2] * 42 + [3] * 42 + [4] * 4


def test_rounding_is_no_improvement_of_a_raw_loss() -> None:
    """7.93 + (0.82 - 7.93) lies above 0.82."""
    assert stages(build(patience=1, smoothing=0.0), [7.93, 0.82, 0.82, 0.82, 0.82]) == [1, 1, 1, 1, 2]


def test_an_improvement_begins_the_patience_anew() -> None:
    pacing = build(patience=2, smoothing=0.0)
    assert stages(pacing, [5.0, 6.0, 6.0, 4.0, 6.0, 6.0]) == [1] * 6
    assert pacing.stage == 1 and pacing.update(6.0)


def test_an_improvement_can_be_too_small_to_count() -> None:
    """Measured from the best that counted, so that many small ones add up."""
    pacing = build(patience=1, smoothing=0.0, min_improvement=0.5)
    assert stages(pacing, [2.0, 1.75, 1.25, 1.0]) == [1] * 4
    assert pacing.best == 1.25 and pacing.update(0.75) and pacing.stage == 2


def test_the_last_stage_never_ends() -> None:
    pacing = build(2, patience=0, smoothing=0.0, stage_steps=3)
    assert stages(pacing, [1.0] * 50) == [1] * 2 + [2] * 48
    assert not build(1, patience=0).update(1.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.9, 0.99])
def test_a_loss_that_jumps_up_with_the_stage_does_not_end_it(smoothing: float) -> None:
    """The best and the average begin anew: the loss of the next stage is compared with that stage alone."""
    pacing = build(patience=3, smoothing=smoothing)
    stages(pacing, [1.0] * 5)
    assert (pacing.stage, pacing.best, pacing.waited, pacing.steps, pacing.average) == (2, math.inf, 0, 0, 0.0)
    falling = [100.0 / (1 + step) for step in range(40)]
    assert stages(pacing, falling) == [2] * 40 and pacing.stage == 2


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.99])
def test_the_average_is_a_weighted_mean_of_the_losses_of_the_stage(smoothing: float) -> None:
    """Weights fall by `smoothing` per step back and sum to 1, from the first step on."""
    pacing, losses = build(smoothing=smoothing), [9.0, 7.0, 4.0, 3.5, 1.0]
    for count in range(1, len(losses) + 1):
        pacing.update(losses[count - 1])
        weights = [smoothing ** (count - 1 - step) for step in range(count)]
        mean = sum(weight * loss for weight, loss in zip(weights, losses, strict=False)) / sum(weights)
        assert pacing.best == pytest.approx(mean)  # falling, so that each is the best


def course_of_algorithm_1(losses: list[float], patience: int, num_stages: int) -> list[int]:
    """Written from the paper's algorithm as the references give it, on raw losses."""
    stage, waited, best, taken = 1, 0, math.inf, []
    for loss in losses:
        taken.append(stage)
        if loss < best:
            best, waited = loss, 0
        else:
            waited += 1
        if waited > patience and stage < num_stages:
            stage, waited, best = stage + 1, 0, math.inf
    return taken


@pytest.mark.parametrize("patience", [0, 1, 4, 30])
def test_raw_losses_take_the_course_of_algorithm_1(patience: int) -> None:
    losses = torch.randn(600, generator=torch.Generator().manual_seed(patience)).tolist()
    pacing = build(8, patience=patience, smoothing=0.0)
    assert stages(pacing, losses) == course_of_algorithm_1(losses, patience, 8)
    assert pacing.stage > 1


def test_a_limit_ends_a_stage_that_still_improves() -> None:
    pacing = build(3, patience=200, stage_steps=7)
    assert stages(pacing, [1 / (1 + step) for step in range(30)]) == [1] * 7 + [2] * 7 + [3] * 16


def test_fixed_stages_do_not_look_at_the_loss() -> None:
    for losses in ([1.0] * 12, [math.inf] * 12, [1 / (1 + step) for step in range(12)]):
        pacing = build(3, pacing="fixed", stage_steps=4)
        assert stages(pacing, losses) == [1] * 4 + [2] * 4 + [3] * 4


PACES: list[dict[str, Any]] = [
    {"patience": 0, "smoothing": 0.0},
    {"patience": 3, "smoothing": 0.9, "min_improvement": 0.01},
    {"patience": 9, "smoothing": 0.5, "stage_steps": 6},
    {"pacing": "fixed", "stage_steps": 5},
]


@pytest.mark.parametrize("settings", PACES)
def test_a_course_goes_on_from_its_state(settings: dict[str, Any]) -> None:
    """To the bit, from any step."""
    losses = torch.rand(60, generator=torch.Generator().manual_seed(3)).tolist()
    whole = build(9, **settings)
    for step in range(len(losses)):
        state = whole.state_dict()
        assert all(type(value) in (int, float) for value in state.values())
        resumed = build(9, **settings)
        resumed.load_state_dict(state)
        other = build(9, **settings)
        other.load_state_dict(state)
        assert stages(resumed, losses[step:]) == stages(other, losses[step:])
        whole.update(losses[step])
    assert whole.state_dict() == resumed.state_dict() == other.state_dict()
    assert stages(build(9, **settings), losses)[-1] > 1


@pytest.mark.parametrize("settings", PACES)
def test_the_last_stage_begins_after_least_steps_at_the_earliest(settings: dict[str, Any]) -> None:
    """Exactly then, if no loss is better than the first of its stage."""
    pacing = build(5, **settings)
    least = pacing.config.least_steps
    assert stages(pacing, [1.0] * (least + 1))[-2:] == [4, 5]
    for seed in range(5):
        losses = torch.rand(least, generator=torch.Generator().manual_seed(seed)).tolist()
        assert stages(build(5, **settings), losses)[-1] < 5
