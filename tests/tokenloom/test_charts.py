"""Charts: round ticks inside the range, places inside the drawing, long curves kept in shape."""

import itertools
import re

import pytest

from tokenloom.charts import HEIGHT, WIDTH, Chart, Series, linear_ticks, log_ticks, thinned, tick_labels

RANGES = [(0, 1500), (0.012, 0.031), (-3.2, 4.1), (92.3, 99.1), (1e-9, 3e-9), (0, 1e6), (0, 3e8)]


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_linear_ticks_are_few_and_inside(low: float, high: float):
    ticks = linear_ticks(low, high, 5)
    assert 2 <= len(ticks) <= 6
    assert low <= min(ticks) and max(ticks) <= high
    assert len(set(tick_labels(ticks))) == len(ticks)


@pytest.mark.parametrize(("low", "high"), [(0.011, 0.9), (1e-5, 40.0), (1.5, 40.0), (1e-12, 1e12)])
def test_log_ticks_are_few_and_inside(low: float, high: float):
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert low <= min(ticks) and max(ticks) <= high


def test_tick_labels_have_the_decimals_of_their_step():
    assert tick_labels([0, 500, 1000]) == ["0", "500", "1,000"]
    assert tick_labels([-0.5, -0.25, 0.0]) == ["−0.50", "−0.25", "0.00"]


def test_a_thinned_curve_keeps_its_mean():
    points = [(float(x), float(x % 7)) for x in range(2400)]
    short = thinned(points, 240)
    assert len(short) == 240
    assert sum(y for _, y in short) / 240 == pytest.approx(sum(y for _, y in points) / 2400)


@pytest.mark.parametrize("values", [[5.0], [2.0, 2.0], [0.0, 0.0], [1e-3, 5.0, 1e-2], [-4.0, 1e7]])
@pytest.mark.parametrize("kind", ["line", "dots", "level", "steps"])
def test_everything_is_drawn_inside(values: list[float], kind: str):
    points = [(float(x), y) for x, y in enumerate(values, start=1)]
    html = Chart(title="loss", series=[Series(label="a", points=points, tone="plain", kind=kind)]).html()
    xs = [float(x) for x in re.findall(r'[" ]c?x[12]?="([-\d.]+)', html)]
    ys = [float(y) for y in re.findall(r'[" ]c?y[12]?="([-\d.]+)', html)]
    assert xs and min(xs) >= 0 and max(xs) <= WIDTH
    assert ys and min(ys) >= 0 and max(ys) <= HEIGHT


def test_labels_of_many_places_do_not_touch():
    names = [f"block_{number}" for number in range(1, 37)]
    series = [Series(label="top-1", points=[(place, 0.5) for place in range(36)], tone="plain", kind="dots")]
    html = Chart(title="probe", series=series, names=names).html()
    marks = re.findall(r'<text x="([\d.]+)" y="195" text-anchor="middle">(\d+)</text>', html)
    places = [float(x) for x, _ in marks]
    assert marks[0][1] == "1" and min(b - a for a, b in itertools.pairwise(places)) > 16


def test_a_chart_without_figures_says_so():
    assert "no figures yet" in Chart(title="loss", series=[Series(label="a", points=[], tone="plain")]).html()
