"""Steps to the baseline's final score, and groups with baselines of their own: numbers that a hand computes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure

from tokenloom.study import checked_rows, run_study
from tokenloom.study_config import StudyConfig, load_study
from tokenloom.study_plan import Run, plan_runs
from tokenloom.study_plot import logarithmic
from tokenloom.study_reach import Reach, first_reached, reach, reach_table, told_reach
from tokenloom.study_results import Found
from tokenloom.study_statistics import geometric_interval

T_2 = 4.30265273  # Student's t at 97.5 %, two degrees of freedom


# The rule


@pytest.mark.parametrize(
    ("line", "step"),
    [
        ({100: 30.0, 200: 20.0, 300: 10.0}, 250.0),  # from 20 to 10 halfway
        ({100: 30.0, 200: 15.0, 300: 10.0}, 200.0),  # at a snapshot
        ({100: 12.0, 200: 9.0}, 100.0),  # good enough from the first one on
        ({100: 18.0, 200: 14.0, 300: 21.0, 400: 9.0}, 125 + 50.0),  # the first time counts, whatever follows
        ({100: 30.0, 200: 15.1}, None),
        ({}, None),
    ],
)
def test_the_first_time_counts_on_a_straight_line(line: dict[int, float], step: float | None) -> None:
    assert first_reached(line, 15.0, higher=False) == step
    mirrored = {at: -value for at, value in line.items()}
    assert first_reached(mirrored, -15.0, higher=True) == step


def test_speed_ups_are_paired_by_seed_and_held_against_the_baselines_own_line() -> None:
    """The baseline of seed 1 has its final 12 already at 300, so that 150 steps are twice as few, not 400 / 150."""
    baseline = {0: {200: 20.0, 400: 10.0}, 1: {200: 14.0, 300: 12.0, 400: 12.0}}
    row = {0: {100: 20.0, 200: 10.0}, 1: {100: 22.0, 200: 2.0}, 7: {100: 1.0}}
    found = reach(row, baseline, last=400, total=200, higher=False)
    assert found is not None
    assert found.steps == {0: 200.0, 1: 150.0} and found.baseline_steps == {0: 400.0, 1: 300.0}
    assert found.mean_steps is not None and found.mean_steps.value == pytest.approx(math.sqrt(200 * 150))
    assert found.speed_up is not None and found.speed_up.value == pytest.approx(2)
    assert found.speed_up.interval == pytest.approx((2, 2)) and found.differs


def test_a_baseline_against_itself_is_neither_sooner_nor_later() -> None:
    lines = {0: {1: 5.0, 2: 3.0}, 1: {1: 4.0, 2: 6.0}}
    found = reach(lines, lines, last=2, total=2, higher=False)
    assert found is not None and found.steps == {0: 2.0, 1: 1.0}
    assert found.speed_up == (1.0, (1.0, 1.0)) and not found.differs


def test_a_score_that_the_first_snapshot_has_is_told_as_such() -> None:
    baseline = {seed: {100: 20.0, 200: 10.0} for seed in range(3)}
    row = {0: {100: 10.0, 200: 5.0}, 1: {100: 9.0, 200: 5.0}, 2: {100: 11.0, 200: 5.0}}
    found = reach(row, baseline, last=200, total=200, higher=False)
    assert found is not None and found.at_once == 2
    assert "of 200 steps, in 2 of 3 seeds at the first snapshot already" in told_reach("row", "base", "fd", found)
    found = reach({0: row[0]}, baseline, last=200, total=200, higher=False)
    assert "after 100 of 200 steps, at the first snapshot already, 2.00" in told_reach("row", "base", "fd", found)


def test_intervals_are_students_on_logarithms() -> None:
    found = Reach(total=1000, steps={0: 500.0, 1: 250.0, 2: 125.0}, baseline_steps=dict.fromkeys(range(3), 1000.0))
    spread = math.exp(T_2 * math.log(2) / math.sqrt(3))  # the logarithms lie log 2 apart
    assert found.speed_up is not None and found.speed_up.value == pytest.approx(4)
    assert found.speed_up.interval == pytest.approx((4 / spread, 4 * spread))
    assert found.mean_steps is not None and found.mean_steps.interval == pytest.approx((250 / spread, 250 * spread))
    assert not found.differs
    with pytest.raises(ValueError, match="positive values alone, not 0"):
        geometric_interval([1.0, 0.0])


def test_dearer_steps_count_by_their_price() -> None:
    found = Reach(total=100, steps={0: 50.0}, baseline_steps={0: 100.0}, price=4.0)
    assert found.speed_up is not None and found.speed_up.value == pytest.approx(0.5)
    assert "2.00 times dearer than `base`" in told_reach("row", "base", "fd", found)
    assert reach_table("base", {"row": found})[0][-1] == "times cheaper than base"


# The words


def told(*steps: float | None, baseline: float = 1000.0) -> str:
    by_seed = dict(enumerate(steps))
    found = Reach(total=1050, steps=by_seed, baseline_steps=dict.fromkeys(by_seed, baseline))
    return told_reach("easy", "plain", "fd", found)


def test_every_outcome_has_its_sentence() -> None:
    reached = "`easy` reaches the final fd of `plain` after"
    assert told(500.0, 500.0, 500.0) == (
        f"{reached} 500 (500 to 500) of 1,050 steps, 2.00 times sooner than `plain` itself (95 %: 2.00 to 2.00)."
    )
    assert told(1000.0, 1000.0, baseline=800.0) == (
        f"{reached} 1,000 (1,000 to 1,000) of 1,050 steps, 1.25 times later than `plain` itself (95 %: 1.25 to 1.25)."
    )
    undecided = "no difference from `plain` itself can be told (speed-up and its 95 % interval: 1.41 ("
    assert undecided in told(1000.0, 500.0)
    assert told(500.0, None, None) == "`easy` does not reach the final fd of `plain` in 2 of 3 seeds."
    assert told(None) == "`easy` does not reach the final fd of `plain` with its one seed."
    assert told(500.0) == (
        f"{reached} 500 of 1,050 steps, 2.00 times sooner than `plain` itself (one seed, no interval)."
    )
    assert told_reach("easy", "plain", "fd", None).startswith("`easy`: no seed yet of which it and `plain`")


def test_the_baseline_has_a_line_of_its_own_and_rows_that_miss_have_no_mean() -> None:
    plain = Reach(total=1050, steps={0: 1000.0, 1: 1000.0}, baseline_steps={0: 1000.0, 1: 1000.0})
    lines = reach_table("plain", {
        "easy": Reach(total=1050, steps={0: 500.0, 1: 500.0}, baseline_steps=plain.baseline_steps),
        "plain": plain,
        "anti": Reach(total=1050, steps={0: 900.0, 1: None}, baseline_steps=plain.baseline_steps),
        "later": None,
    })  # fmt: skip
    assert lines == [
        ["row", "reached by", "after steps", "times sooner than plain"],
        ["plain", "2 of 2", "1,000 (1,000 to 1,000) of 1,050", "–"],
        ["easy", "2 of 2", "500 (500 to 500) of 1,050", "**2.00 (2.00 to 2.00)**"],
        ["anti", "1 of 2", "–", "–"],
        ["later", "–", "–", "–"],
    ]


# Results of a study


SCORES = {  # by row and seed, after 8, 16 and 20 steps
    "a": [(30.0, 20.0, 10.0), (32.0, 22.0, 12.0)],
    "b": [(20.0, 5.0, 4.0), (22.0, 7.0, 6.0)],
    "c": [(10.0, 9.0, 3.0), (10.0, 9.0, 8.0)],
}
CONTENT: dict[str, Any] = {
    "study": {
        "title": "Small", "stages": "generator", "seeds": [0, 1], "budget": "steps", "baseline": "a",
        "metrics": [{"name": "fd", "subject": "diffusion", "better": "lower"}],
        "curve": {"stage": "diffusion", "score": "fd"},
        "rows": {"a": {}, "b": {"diffusion.path": "gvp"}, "c": {"diffusion.weight": "p2"}},
        "groups": [{"title": "First", "rows": ["a", "b"]}, {"title": "Second", "rows": ["b", "c"], "baseline": "b"}],
    },
    "data": {"source": "digits", "size": 16},
    "tokenizer": {"model": {"architecture": "pixels"}},
    "diffusion": {
        "model": {"depth": 1, "width": 16, "heads": 2, "patch_size": 4}, "train": {"steps": 20, "snapshot_every": 8},
    },
    "eval": {"features": ["random"], "snapshots": True},
}  # fmt: skip


def loaded(folder: Path, **changes: Any) -> tuple[StudyConfig, Any]:
    (folder / "study.yaml").write_text(yaml.safe_dump({**CONTENT, "study": {**CONTENT["study"], **changes}}))
    return load_study(["--config", str(folder / "study.yaml"), f"--run.root={folder}", "--run.name=small"])


def pretend(run: Run) -> None:
    """Leave what a finished run would leave."""
    (run.folder / "eval").mkdir(parents=True)
    (run.folder / "study.json").write_text(json.dumps({"settings": run.settings, "seconds": 1.0}))
    subjects = ("diffusion@step8", "diffusion@step16", "diffusion")
    (run.folder / "eval" / "metrics.json").write_text(json.dumps([
        {"name": "fd_random", "subject": subject, "value": value, "interval": None, "n": 20, "protocol": {"judge": 1}}
        for subject, value in zip(subjects, SCORES[run.row][run.seed], strict=True)
    ]))  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, dict[str, Any], str]:
    study, base = loaded(tmp_path_factory.mktemp("reach"))
    for run in plan_runs(study, checked_rows(study, base), study.seeds, base.run):
        pretend(run)
    found = run_study(study, base, report_only=True)
    files = [(base.run.folder / name).read_text() for name in ("results.json", "results.md")]
    return found, json.loads(files[0]), files[1]


def test_rows_differ_from_the_baseline_of_each_of_their_groups(done: tuple[Found, dict[str, Any], str]) -> None:
    _, results, text = done
    rows = results["rows"]
    assert rows["c"]["differences"]["diffusion/fd"]["value"] == -5.5  # from the study's
    assert rows["b"]["differences"]["diffusion/fd"]["value"] == -6
    assert {title: told["baseline"] for title, told in rows["b"]["groups"].items()} == {"First": "a", "Second": "b"}
    assert rows["b"]["groups"]["First"]["differences"]["diffusion/fd"] == {"value": -6, "interval": [-6, -6], "n": 2}
    assert rows["b"]["groups"]["Second"]["differences"]["diffusion/fd"] is None
    assert rows["c"]["groups"]["Second"]["differences"]["diffusion/fd"]["value"] == 0.5  # -1 and +2
    assert text.count("| minus a |") == 1 and text.count("| minus b |") == 1


def test_steps_to_reach_are_in_the_results(done: tuple[Found, dict[str, Any], str]) -> None:
    _, results, text = done
    first = results["rows"]["b"]["groups"]["First"]["reach"]
    assert first["of_steps"] == 20 and first["reached"] == 2
    # From 20 to 5 and from 22 to 7 between 8 and 16 steps: 10 of the 15 each.
    assert first["steps"] == pytest.approx({"0": 8 + 8 * 10 / 15, "1": 8 + 8 * 10 / 15})
    assert first["speed_up"]["value"] == pytest.approx(1.5) and first["speed_up"]["n"] == 2
    second = results["rows"]["c"]["groups"]["Second"]["reach"]
    assert second["steps"] == {"0": pytest.approx(16 + 4 * 5 / 6), "1": None}
    assert (second["reached"], second["mean_steps"], second["speed_up"]) == (1, None, None)
    assert results["rows"]["c"]["runs"]["1"]["curve"] == {"8": 10, "16": 9, "20": 8}
    assert "### Second: the final Fréchet distance of b" in text
    assert "`c` does not reach the final fd of `b` in 1 of 2 seeds." in text
    assert "| b | 2 of 2 | 13 (13 to 13) of 20 | **1.50 (1.50 to 1.50)** |" in text
    assert "1.50 times sooner than `a` itself (95 %: 1.50 to 1.50)." in text
    assert "- `a` itself first has its final fd after 20 (20 to 20) of 20 steps." in text


def test_more_flops_a_step_are_weighed(done: tuple[Found, dict[str, Any], str], tmp_path: Path) -> None:
    study, base = loaded(tmp_path, budget="flops", rows={"a": {}, "b": {"diffusion.model.depth": 2}}, groups=[])
    rows = checked_rows(study, base)
    price = rows[1].costs["diffusion"].own / rows[0].costs["diffusion"].own
    lines = {"a": done[0].lines["a"], "b": done[0].lines["b"]}
    empty: dict[str, Any] = {key: {} for key in ("values", "names", "protocols", "runs", "courses", "problems")}
    found = Found(study=study, rows=rows, seeds=[0, 1], lines=lines, **empty).reach("b", "a")
    assert price > 1.3 and found is not None and found.speed_up is not None
    assert found.speed_up.value == pytest.approx(1.5 / price)
    assert found.total == rows[1].steps["diffusion"] < rows[0].steps["diffusion"]  # the row's own


def test_without_a_score_over_steps_there_is_nothing_to_reach(tmp_path: Path) -> None:
    study, base = loaded(tmp_path, curve={"stage": "diffusion", "metric": "loss"})
    found = run_study(study, base, report_only=True)
    text = (base.run.folder / "results.md").read_text()
    assert "reach" not in text and found.reach("b", "a") is None


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"title": "A", "rows": ["a"], "baseline": "b"}], "study.groups, 'A', baseline: unknown 'b'; known are a"),
        ([{"title": "A", "rows": ["a"]}, {"title": "A", "rows": ["b"]}], "two groups have one title"),
    ],
)
def test_a_group_that_does_not_fit_is_named(tmp_path: Path, groups: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path, groups=groups)


def test_a_bad_beginning_does_not_flatten_the_curves() -> None:
    axes = Figure().subplots()
    axes.plot([1, 2, 3], [72.0, 17.0, 11.0])
    logarithmic(axes, 10.0, 80.0)
    assert axes.get_yscale() == "log" and axes.get_ylim() == (10.0, 80.0)
    shown = [tick for tick in axes.get_yticks() if 10 <= tick <= 80]
    assert shown == pytest.approx([10, 15, 20, 30, 50, 70]) and not axes.get_yticks(minor=True).size
