"""Steps: increasing log SNR, spaced evenly in what their name says, ending one step before clean data."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from generator.config import DiffusionSampleConfig, FixedScheduleKind, MixedScheduleConfig, ScheduleConfig
from generator.path import cosine_time, flow_time, noise_to_signal
from generator.published_steps import PUBLISHED, published_stops
from generator.schedule import build_schedule
from generator.steps import STEPS, along, solver_levels

COSINE = build_schedule(ScheduleConfig())


def test_every_choice_has_a_row() -> None:
    assert set(typing.get_args(typing.get_type_hints(DiffusionSampleConfig)["steps"])) == set(STEPS)


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("num", [1, 2, 50])
def test_noise_decreases_from_the_first_level(kind: str, num: int) -> None:
    listed = torch.linspace(-9, 3, num).tolist() if kind == "list" else ()
    aligned = (-9.0, -3.0, 0.0, 4.0)
    levels = solver_levels(kind, num, first=-9.0, last=8.0, listed=listed, aligned=aligned, schedule=COSINE)
    assert levels.shape == (num,)
    assert levels.dtype == torch.float64
    first = -2 * math.log(PUBLISHED[kind][0]) if kind in PUBLISHED else -9.0
    assert float(levels[0]) == pytest.approx(first)
    assert bool((levels.diff() > 0).all())


@pytest.mark.parametrize(("kind", "to_time"), [("cosine", cosine_time), ("flow", flow_time)])
def test_time_steps_are_even_down_to_clean_data(kind: str, to_time: Callable[[Tensor], Tensor]) -> None:
    time = to_time(solver_levels(kind, 8, first=-9.0, last=8.0))
    stops = torch.cat([time, time.new_zeros(1)])
    torch.testing.assert_close(stops.diff(), (-time[0] / 8).expand(8))


@pytest.mark.parametrize(
    "config",
    [
        *(ScheduleConfig(kind=kind) for kind in typing.get_args(FixedScheduleKind)),
        ScheduleConfig(kind="ddpm", zero_terminal=True),
        ScheduleConfig(kind="laplace", mixed=MixedScheduleConfig(kind="cosine", share=0.3)),
    ],
)
def test_steps_in_the_time_of_any_schedule_are_even(config: ScheduleConfig) -> None:
    """Of the draws, as many lie between any two stops; the last interval reaches to clean data."""
    schedule = build_schedule(config)
    levels = solver_levels("time", 20, first=-9.0, last=8.0, schedule=schedule)
    share = torch.cat([schedule.cdf(levels), torch.ones(1)])
    assert float(levels[0]) == pytest.approx(-9.0)
    torch.testing.assert_close(share.diff(), ((1 - share[0]) / 20).expand(20))


def test_steps_in_the_time_of_the_cosine_schedule_are_cosine_steps() -> None:
    ends = {"first": -9.0, "last": 8.0}
    torch.testing.assert_close(solver_levels("time", 9, schedule=COSINE, **ends), solver_levels("cosine", 9, **ends))


def test_a_schedule_without_so_much_noise_starts_at_its_own_end() -> None:
    """DDPM's last alpha-bar is 4.03583e-5; EDM's normal has no float64 for its tail below -40."""
    ddpm, edm = (build_schedule(ScheduleConfig(kind=kind)) for kind in ("ddpm", "edm"))
    end = math.log(4.03583e-5 / (1 - 4.03583e-5))
    assert float(solver_levels("time", 5, first=-15.0, last=8.0, schedule=ddpm)[0]) == pytest.approx(end, abs=1e-4)
    assert float(solver_levels("time", 5, first=-60.0, last=8.0, schedule=edm)[0]) == -60.0


@pytest.mark.parametrize(("kind", "location"), [("edm", -15.0), ("ddpm", -25.0), ("laplace", -30.0)])
def test_a_schedule_that_has_no_draws_above_the_first_level_is_refused(kind: Any, location: float) -> None:
    schedule = build_schedule(ScheduleConfig(kind=kind, location=location, scale=0.5))
    with pytest.raises(ValueError, match=r"steps=time with num_steps=5, first_logsnr=-10\.0 .* must rise.*: lower"):
        solver_levels("time", 5, first=-10.0, last=8.0, schedule=schedule)
    assert bool((solver_levels("time", 5, first=-40.0, last=8.0, schedule=schedule).diff() > 0).all())


def test_levels_beyond_all_numbers_are_refused() -> None:
    cauchy = build_schedule(ScheduleConfig(kind="cauchy"))
    assert float(solver_levels("time", 1000, first=-10.0, last=8.0, schedule=cauchy)[-1]) > 300
    for kind, num, last, listed in (("time", 4000, 8.0, ()), ("logsnr", 3, 900.0, ()), ("list", 1, 8.0, (0.0, 701.0))):
        with pytest.raises(ValueError, match=rf"steps={kind} .* to 700 at most"):
            solver_levels(kind, num, first=-10.0, last=last, listed=listed, schedule=cauchy)


def test_logsnr_steps_are_even_from_first_to_last() -> None:
    levels = solver_levels("logsnr", 5, first=-8.0, last=8.0)
    torch.testing.assert_close(levels, torch.tensor([-8.0, -4.0, 0.0, 4.0, 8.0], dtype=torch.float64))


def test_karras_steps_are_those_of_edm() -> None:
    """18 steps from s = 80 to 0.002; the second and third of Karras et al.'s released code, and its end."""
    first, last = (-2 * math.log(s) for s in (80, 0.002))
    s = noise_to_signal(solver_levels("karras", 18, first=first, last=last)).tolist()
    assert [*s[:3], s[-1]] == pytest.approx([80, 57.58598, 40.78557, 0.002], rel=1e-6)
    root = noise_to_signal(solver_levels("karras", 9, first=first, last=last, rho=3)).pow(1 / 3)
    torch.testing.assert_close(root.diff(), ((root[-1] - root[0]) / 8).expand(8))


# Table 3 of Align Your Steps, noise from high to low.
TABLE = {
    "sd15": [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029],
    "sdxl": [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029],
    "deepfloyd": [160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006],
    "svd": [700, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002],
}
SDXL_IN_20 = [
    14.615, 9.607, 6.315, 4.880, 3.771, 2.868, 2.181, 1.711, 1.342, 1.076, 0.862, 0.692, 0.555, 0.459, 0.380, 0.298,
    0.234, 0.163, 0.113, 0.057, 0.029,
]  # fmt: skip


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_steps_are_those_of_the_paper_without_the_end(kind: str) -> None:
    noise = noise_to_signal(solver_levels(kind, 10, first=-10.0, last=10.0)).tolist()
    assert noise == pytest.approx(TABLE[kind][:10], rel=1e-9)
    assert math.exp(-published_stops(kind)[10] / 2) == pytest.approx(TABLE[kind][10])  # which more steps lead up to


def test_more_steps_of_a_published_schedule_are_interpolated_in_the_logarithm() -> None:
    noise = noise_to_signal(solver_levels("sdxl", 20, first=-10.0, last=10.0)).tolist()
    assert noise == pytest.approx(SDXL_IN_20[:20], abs=6e-4)  # three digits are published


def test_steps_along_a_schedule_are_its_own_where_they_can_be() -> None:
    stops = [-9.0, -4.0, -1.5, 0.25, 1.0, 3.0, 4.5, 5.0, 7.0]
    assert along(stops, 8).tolist() == stops[:-1]
    assert along(stops, 4).tolist() == stops[:-1:2]
    assert along(stops, 1).tolist() == [-9.0]
    assert along([0.0, 3.0, 5.0], 3).tolist() == pytest.approx([0.0, 2.0, 3.0 + 2 / 3])
    aligned = solver_levels("aligned", 4, first=-1.0, last=1.0, aligned=stops)  # which has ends of its own
    assert aligned.tolist() == stops[:-1:2]


@pytest.mark.parametrize("kind", ["cosine", "flow", "time", "list"])
def test_steps_from_no_signal_start_at_minus_infinity(kind: str) -> None:
    settings: dict[str, Any] = {"first": -9.0, "last": 8.0, "listed": (-8.0, 0.0, 3.0, 5.0), "schedule": COSINE}
    levels = solver_levels(kind, 4, from_zero_snr=True, **settings)
    assert float(levels[0]) == -math.inf
    assert bool(levels[1:].isfinite().all()) and bool((levels[1:].diff() > 0).all())
    if kind == "list":
        assert levels[1:].tolist() == [0, 3, 5]
    if kind in ("cosine", "flow"):
        time = {"cosine": cosine_time, "flow": flow_time}[kind](levels)
        torch.testing.assert_close(time, torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64))


def test_bad_settings_are_refused() -> None:
    ends = {"first": -8.0, "last": 8.0}
    with pytest.raises(ValueError, match=r"diffusion\.sample\.steps='ays' is unknown"):
        solver_levels("ays", 5, **ends)
    with pytest.raises(ValueError, match=r"num_steps=0 must be at least 1"):
        solver_levels("cosine", 0, **ends)
    with pytest.raises(ValueError, match=r"first_logsnr=8 must lie below last_logsnr=-8"):
        solver_levels("cosine", 5, first=8, last=-8)
    with pytest.raises(ValueError, match=r"steps=time are steps of a training schedule: give it"):
        solver_levels("time", 5, **ends)
    with pytest.raises(ValueError, match=r"diffusion\.sample\.rho=0 must be positive"):
        solver_levels("karras", 5, rho=0, **ends)
    for kind in ("logsnr", "karras", "aligned", "sdxl"):
        with pytest.raises(ValueError, match=rf"from_zero_snr has no place in steps={kind}"):
            solver_levels(kind, 5, from_zero_snr=True, aligned=(-8.0, 8.0), **ends)
    with pytest.raises(ValueError, match=r"steps=aligned .* there are none: run `tokenloom steps --config"):
        solver_levels("aligned", 5, **ends)
    for listed in ((), (1.0, 0.0), (0.0, 0.0), (-math.inf, 0.0)):
        with pytest.raises(ValueError, match=r"diffusion\.sample\.levels=\[.*\] must be finite log SNRs that rise"):
            solver_levels("list", 5, listed=listed, **ends)
