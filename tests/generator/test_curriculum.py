"""Curricula: the draws of a step are a function of the step alone, and move as the settings say."""

from __future__ import annotations

import typing
from typing import Any

import pytest
import torch

from generator.config import CurriculumConfig, MixedScheduleConfig, ScheduleConfig
from generator.curriculum import SHIFTS, Curriculum, final_schedule
from generator.schedule import MAX_LOGSNR, build_schedule

SCHEDULE = build_schedule(ScheduleConfig(kind="laplace"))
U = torch.linspace(0.001, 0.999, 1001)


def build(kind: Any = "progressive", steps: int = 101, **settings: Any) -> Curriculum:
    return Curriculum(CurriculumConfig(kind=kind, **settings), SCHEDULE, steps=steps)


def test_every_choice_has_a_row() -> None:
    assert set(typing.get_args(typing.get_type_hints(CurriculumConfig)["kind"])) == set(SHIFTS)


def test_uniform_is_the_schedule_throughout() -> None:
    for step in (0, 50, 100):
        assert torch.equal(build("uniform").draw(U, step), SCHEDULE(U))
    assert final_schedule(CurriculumConfig(), SCHEDULE) == SCHEDULE


def test_progressive_moves_the_schedule_along_a_line() -> None:
    curriculum = build(start=3.0, end=-1.0)
    for step, shift in ((0, 3.0), (25, 2.0), (75, 0.0), (100, -1.0)):
        assert curriculum.shift(step) == pytest.approx(shift)
        torch.testing.assert_close(curriculum.draw(U, step), SCHEDULE(U) + shift)
    means = torch.stack([curriculum.draw(U, step).mean() for step in range(101)])
    torch.testing.assert_close(means, torch.linspace(3.0, -1.0, 101), rtol=0, atol=1e-4)
    assert torch.equal(curriculum.final(U), curriculum.draw(U, 100))


def test_a_training_that_is_over_or_has_one_step_is_at_its_end() -> None:
    assert build(end=-1.5).shift(500) == -1.5
    assert build(steps=1, end=-1.5).shift(0) == -1.5


def test_a_step_draws_by_its_share_of_the_training() -> None:
    """So a training that goes on to more steps than it began with draws as a longer one does there."""
    for short, long in ((0, 0), (50, 100), (100, 200)):
        assert torch.equal(build(steps=101).draw(U, short), build(steps=201).draw(U, long))
    assert build(steps=201).shift(100) != build(steps=101).shift(100)


def test_the_schedule_ends_where_the_last_step_draws() -> None:
    mixed = build_schedule(ScheduleConfig(kind="cosine", mixed=MixedScheduleConfig(kind="cauchy", location=1.0)))
    for schedule in (SCHEDULE, mixed):
        config = CurriculumConfig(kind="progressive", start=3.0, end=-1.5)
        ended = final_schedule(config, schedule)
        torch.testing.assert_close(ended(U), Curriculum(config, schedule, steps=7).final(U))
        torch.testing.assert_close(ended.cdf(ended.inverse(U)), U.double(), rtol=0, atol=1e-9)
        torch.testing.assert_close(ended.pdf(U - 1.5), schedule.pdf(U))


def test_draws_stay_in_the_range_of_training_and_rise_with_u() -> None:
    """Moved before they are clamped: what lies far outside comes back in."""
    curriculum = build(start=30.0, end=-18.0)
    for step in range(0, 101, 20):
        logsnr = curriculum.draw(torch.cat([torch.zeros(1), U]), step)
        assert logsnr.dtype == torch.float32 and bool((logsnr.diff() >= 0).all())
        assert float(logsnr.abs().max()) <= float(torch.tensor(MAX_LOGSNR))
    assert bool((curriculum.draw(U, 0) == torch.tensor(MAX_LOGSNR)).all())
    torch.testing.assert_close(curriculum.final(U[500:501]), torch.tensor([-18.0]))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"diffusion\.curriculum\.kind='harder' is unknown"):
        build("harder")
