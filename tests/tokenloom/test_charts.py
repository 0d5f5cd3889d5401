"""Charts: round ticks inside the range, places inside the drawing, long curves kept in shape; those of a curriculum."""

import itertools
import math
import re

import pytest

from tokenloom.charts import (
    HEIGHT,
    WIDTH,
    Chart,
    Series,
    linear_ticks,
    log_ticks,
    thinned,
    tick_labels,
)
from tokenloom.curriculum_curves import MAX_COLUMNS, curriculum_panels
from tokenloom.heat_map import HeatMap, shade_labels, shade_levels

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
@pytest.mark.parametrize("kind", ["line", "dots", "level", "steps", "stairs"])
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


def test_stairs_keep_each_value_until_the_next():
    points = [(0.0, 1.0), (50.0, 2.0), (100.0, 2.0)]
    series = Series(label="stage", points=points, tone="plain", kind="stairs")
    html = Chart(title="stage", series=[series], y_range=(0.0, 4.0)).html()
    left, first, places = re.findall(r'<path class="curve" d="M([\d.]+) ([\d.]+)(.*?)"', html)[0]
    (x0, y0), (x1, y1), (x2, y2) = re.findall(r"H([\d.]+)V([\d.]+)", places)
    assert (x0, y0) == (left, first) and y1 == y2
    assert float(x1) - float(x0) == pytest.approx(float(x2) - float(x1), abs=0.2)
    assert float(y0) - float(y1) == pytest.approx((HEIGHT - 36 - 22) / 4, abs=0.2)


def heat_map(cells: list[list[float | None]], columns: list[float], **more: object) -> str:
    told = {"title": "map", "tone": "plain", "unit": "row", "shade": "value", "empty": "none", "levels": [2.0, 3.0]}
    rows = [float(row) for row in range(len(cells[0]) + 1)]
    return HeatMap(columns=columns, rows=rows, cells=cells, ticks=rows, **{**told, **more}).html()


def rectangles(html: str) -> dict[float, list[tuple[float, ...]]]:
    """Left, bottom, right and top of all rectangles, by the opacity of their shade."""
    number = r"([\d.]+)"
    corners = rf"M{number} {number}H{number}V{number}H{number}Z"
    paths = re.findall(r'<path class="cells" fill-opacity="([\d.]+)" d="(.*?)"', html)
    assert all(re.fullmatch(f"({corners})+", path) for _, path in paths)
    return {float(shade): [tuple(map(float, each[:4])) for each in re.findall(corners, path)] for shade, path in paths}


def test_a_cell_has_its_shade_place_and_width_and_an_empty_one_none():
    found = rectangles(heat_map([[1.0, None], [2.0, 3.5], [2.5, None]], [0.0, 10.0, 30.0, 40.0]))
    assert list(found) == [0.15, 0.57, 1.0]
    (light,), (middle,), (dark,) = found.values()  # the two middle ones of the lower row are one rectangle
    assert middle[2] - middle[0] == pytest.approx(3 * (light[2] - light[0]), abs=0.3)
    assert dark[2] - dark[0] == pytest.approx(2 * (light[2] - light[0]), abs=0.3)
    assert dark[0] == middle[0] == light[2]
    assert dark[1] == light[3] == middle[3] and light[1] == middle[1] > dark[1] > dark[3]


def test_bounds_stay_inside_the_rows():
    html = heat_map([[1.0, 2.0]], [0.0, 5.0], bounds=[(-18.4, 1.0)], bounds_label="active & all")
    low, high = re.findall(r'<path class="bound" d="M[\d.]+ ([\d.]+)H[\d.]+"', html)
    assert float(low) == HEIGHT - 36 and float(high) == pytest.approx((HEIGHT - 36 + 22) / 2)
    assert html.count("active &amp; all") == 2  # in the legend, and read aloud
    assert "bound" not in heat_map([[1.0, 2.0]], [0.0, 5.0])


def test_the_legend_tells_of_empty_cells_where_there_are_any():
    assert '<i class="key empty"></i>none' in heat_map([[1.0, None]], [0.0, 5.0])
    assert "key empty" not in heat_map([[1.0, 2.0]], [0.0, 5.0])
    assert "no figures yet" in heat_map([[None, None]], [0.0, 5.0])


def test_shades_have_round_limits_that_outliers_do_not_stretch():
    values = [0.3 + 0.01 * place for place in range(100)]
    levels = shade_levels([*values, 1e6])
    assert levels == [0.4, 0.6, 0.8, 1.0, 1.2]
    assert shade_labels(levels, values)[:2] == ["below 0.4", "0.4 to 0.6"]
    assert shade_labels(levels, values)[-1] == "1.2 or more"
    assert shade_labels(shade_levels([10.0**power for power in range(5)]), [])[0].startswith("below")
    assert shade_levels([0.7, 0.7]) == [] and shade_labels([], [0.7, 0.7]) == ["0.7"]


def cluster_lines(table: list[list[float | None]], prefix: str = "") -> list[dict]:
    """A log line every ten steps with the loss of each cluster that has one."""
    return [
        {"step": 10 * step, **{f"{prefix}loss_cluster/{n:02d}": v for n, v in enumerate(row, 1) if v is not None}}
        for step, row in enumerate(table, start=1)
    ]


def draws_lines(shares: list[list[float]]) -> list[dict]:
    told = {"curriculum/stage": 1, "curriculum/lowest_logsnr": -18.4, "curriculum/highest_logsnr": 0.5}
    edges = list(range(-2, len(shares[0]) - 1))
    draws = ({"edges": edges, "shares": row} for row in shares)
    return [{"step": 10 * place, **told, "curriculum/draws": each} for place, each in enumerate(draws, start=1)]


def shaded(html: str, column: int, row: int, columns: int, rows: int) -> float | None:
    """Opacity in the middle of a cell, the first row at the bottom; None where it is empty."""
    left, right = (float(x) for x in re.findall(r'class="axis" x1="([\d.]+)" x2="([\d.]+)"', html)[0])
    x = left + (column + 0.5) / columns * (right - left)
    y = HEIGHT - 36 - (row + 0.5) / rows * (HEIGHT - 36 - 22)
    hits = [
        shade for shade, boxes in rectangles(html).items() for x0, y0, x1, y1 in boxes if x0 < x < x1 and y1 < y < y0
    ]
    assert len(hits) <= 1
    return hits[0] if hits else None


def test_shares_of_the_draws_are_shaded_where_they_fell():
    _, html = curriculum_panels(draws_lines([[0.0, 0.96, 0.04, 0.0], [0.0, 0.07, 0.93, 0.0]]))
    levels = [1, 2, 5, 10, 20, 50]  # per cent
    found = [[shaded(html, column, row, 2, 4) for row in range(4)] for column in range(2)]
    shade = {below: pytest.approx(0.15 + 0.85 * below / len(levels), abs=0.006) for below in range(7)}
    assert found == [[None, shade[6], shade[2], None], [None, shade[3], shade[6], None]]
    assert "% of draws: from 4 to 96, 2 columns up to step 20" in html
    assert "active range, at last log SNR −18.4 to 0.5" in html
    high = re.findall(r'class="bound" d="M[\d.]+ ([\d.]+)H', html)[1]
    assert float(high) == pytest.approx(HEIGHT - 36 - (HEIGHT - 36 - 22) * 2.5 / 4, abs=0.06)  # 0.5 on -2 .. 2


def test_columns_of_a_long_log_are_means_of_lines():
    shares = [[0.3, 0.7], [0.7, 0.3]] * (MAX_COLUMNS + 1)
    _, html = curriculum_panels(draws_lines(shares))
    assert "% of draws: from 43.33 to 56.67, 41 columns" in html  # of three lines each
    table = [[1.0] * 8] * 1000
    (html,) = curriculum_panels(cluster_lines(table))
    assert max(len(boxes) for boxes in rectangles(html).values()) == 8
    assert "columns up to step 10,000" in html and int(re.findall(r"(\d+) columns", html)[0]) <= MAX_COLUMNS


def test_clusters_that_were_not_drawn_are_empty_and_others_shaded_against_their_first_loss():
    table = [[None] * 7 + [80.0], [None] * 6 + [0.5, 40.0], [None] * 5 + [6.0, 0.25, 20.0]]
    table += [[9.0, 9.0, 9.0, 9.0, 9.0, 6.0, 0.25, 20.0]]
    (html,) = curriculum_panels(cluster_lines(table))
    assert "loss / its first: from 0.25 to 1, 4 columns up to step 40" in html
    found = [[shaded(html, column, row, 4, 8) for column in range(4)] for row in range(8)]  # cluster 8 at the bottom
    assert found[0][0] == found[1][1] == found[2][2] == found[7][3] == 1.0
    assert found[0][1] == found[1][2] and found[0][1] > found[0][2] == found[0][3] == 0.15
    empty = [[each is None for each in row] for row in found]
    assert empty == [[value is None for value in column] for column in zip(*table, strict=True)][::-1]


def test_losses_below_zero_are_told_as_differences():
    table = [[1.0 - place for place in range(8)], [0.5 - place for place in range(8)]]
    (html,) = curriculum_panels(cluster_lines(table))
    assert "loss − its first: from -0.5 to 0, 2 columns" in html


def test_few_clusters_are_lines_of_their_losses():
    lines = cluster_lines([[None, 4.0, 2.0], [None, 3.0, 1.5], [None, "nan", 1.25]])
    (html,) = curriculum_panels(lines)
    assert "2: 3: from 4 to 3, 2 points; 3: 1.25: from 2 to 1.25, 3 points" in html


def test_many_clusters_on_test_latents_have_a_map_and_a_profile():
    lines = cluster_lines([[8.0] * 9, [4.0] * 9, [2.0] * 9], "validation/")
    heat, profile = curriculum_panels(lines)
    assert "loss / its first: from 0.25 to 1, 3 columns up to step 30" in heat
    assert "step 10: from 8 to 8, 9 points; step 30: from 2 to 2, 9 points" in profile
    (profile,) = curriculum_panels(lines[:1])
    assert "step 10: from 8 to 8, 9 points" in profile and "step 30" not in profile


def test_stages_are_told_where_they_begin():
    lines = [
        {
            "step": 5 * place,
            "curriculum/stage": stage,
            "curriculum/lowest_logsnr": -18.42,
            "curriculum/highest_logsnr": top,
        }
        for place, (stage, top) in enumerate([(1, -4.0), (1, -4.0), (2, 0.26), (4, 18.42), (4, 18.42)], start=1)
    ]
    (html,) = curriculum_panels(lines)
    titles = re.findall("<title>(.*?)</title>", html)
    assert titles[:2] == ["step 5: stage 1, log SNR −18.4 to −4.0", "step 15: stage 2, log SNR −18.4 to 0.3"]
    assert titles[2:] == ["step 20: stage 4, log SNR −18.4 to 18.4", "step 25: stage 4, log SNR −18.4 to 18.4"]


def test_a_log_without_a_curriculum_has_no_charts_of_it():
    assert curriculum_panels([{"step": 1, "loss": 1.0, "loss_quarter_1": 2.0}, {"step": 2, "loss": math.inf}]) == []
    assert curriculum_panels([]) == []
