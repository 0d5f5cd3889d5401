"""Steps: increasing log SNR, spaced evenly in what their name says, ending one step before clean data."""

from __future__ import annotations

import typing
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from generator.config import DiffusionSampleConfig
from generator.path import cosine_time, flow_time
from generator.steps import STEPS, solver_levels


def test_every_choice_has_a_row() -> None:
    assert set(typing.get_args(typing.get_type_hints(DiffusionSampleConfig)["steps"])) == set(STEPS)


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("num", [1, 2, 50])
def test_noise_decreases_from_the_first_level(kind: str, num: int) -> None:
    levels = solver_levels(kind, num, first=-9.0, last=8.0)
    assert levels.shape == (num,)
    assert levels.dtype == torch.float64
    assert float(levels[0]) == pytest.approx(-9.0)
    assert bool((levels.diff() > 0).all())


@pytest.mark.parametrize(("kind", "to_time"), [("cosine", cosine_time), ("flow", flow_time)])
def test_time_steps_are_even_down_to_clean_data(kind: str, to_time: Callable[[Tensor], Tensor]) -> None:
    time = to_time(solver_levels(kind, 8, first=-9.0, last=8.0))
    stops = torch.cat([time, time.new_zeros(1)])
    torch.testing.assert_close(stops.diff(), (-time[0] / 8).expand(8))


def test_logsnr_steps_are_even_from_first_to_last() -> None:
    levels = solver_levels("logsnr", 5, first=-8.0, last=8.0)
    torch.testing.assert_close(levels, torch.tensor([-8.0, -4.0, 0.0, 4.0, 8.0], dtype=torch.float64))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"diffusion\.sample\.steps='karras' is unknown"):
        solver_levels("karras", 5, first=-8, last=8)
    with pytest.raises(ValueError, match=r"num_steps=0 must be at least 1"):
        solver_levels("cosine", 0, first=-8, last=8)
    with pytest.raises(ValueError, match=r"first_logsnr=8 must lie below last_logsnr=-8"):
        solver_levels("cosine", 5, first=8, last=-8)
