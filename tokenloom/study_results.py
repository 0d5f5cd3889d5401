"""What a study has found: values of every run, means with intervals, and steps to reach a score."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.protocol import comparable
from eval.statistics import Estimate
from tokenloom.run_files import RunFiles
from tokenloom.score_table import PERCENT, UP, find, kind_of
from tokenloom.study_config import GroupConfig, MetricConfig, StudyConfig
from tokenloom.study_course import Course, Line, course, curve_protocol, line_of, unlike_scores
from tokenloom.study_jobs import changed_settings, finished
from tokenloom.study_plan import Row, Run
from tokenloom.study_reach import Reach, reach
from tokenloom.study_statistics import mean_interval, paired_difference

SPEED = "images_per_second"
Values = dict[str, dict[str, dict[int, float]]]
"""By metric key, row and seed."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """All that a study's folder tells."""

    study: StudyConfig
    rows: Sequence[Row]
    seeds: Sequence[int]
    values: Values
    names: dict[str, str]
    """By metric key, the whole name of the score, features included."""
    protocols: dict[str, dict[str, Any]]
    """By metric key, what the scores were measured under."""
    runs: dict[str, dict[int, dict[str, Any]]]
    """By row and seed: state, seconds."""
    lines: dict[str, dict[int, Line]]
    """By row and seed, the study's curve."""
    courses: dict[str, Course]
    """By row, the mean of these curves."""
    problems: dict[str, str]
    """By name of a run, what went wrong."""

    def mean(self, metric: str, row: str) -> tuple[Estimate, int] | None:
        """Mean over the row's seeds with its interval, and their number."""
        values = list(self.values[metric].get(row, {}).values())
        return (mean_interval(values), len(values)) if values else None

    def difference(self, metric: str, row: str, baseline: str | None = None) -> tuple[Estimate, int] | None:
        """Mean difference from a baseline, the study's if none is named, paired by seed; None for itself."""
        table, baseline = self.values[metric], baseline or self.study.reference
        if row == baseline:
            return None
        return paired_difference(table.get(row, {}), table.get(baseline, {}))

    def reach(self, row: str, baseline: str) -> Reach | None:
        """When a row's score over training is as good as a baseline's last; None where there is nothing to tell."""
        curve, rows = self.study.curve, {each.name: each for each in self.rows}
        if curve.score is None or curve.stage not in rows[row].costs.keys() & rows[baseline].costs.keys():
            return None
        mine, other = rows[row].costs[curve.stage], rows[baseline].costs[curve.stage]
        return reach(
            self.lines[row], self.lines[baseline], last=rows[baseline].steps[curve.stage],
            total=rows[row].steps[curve.stage], higher=kind_of(curve.score).better == UP,
            price=mine.own / other.own if self.study.budget == "flops" else 1.0,
        )  # fmt: skip


def key_of(metric: MetricConfig) -> str:
    """A metric's name within the results."""
    return f"{metric.subject}/{metric.name}"


def gather(study: StudyConfig, rows: Sequence[Row], runs: Sequence[Run], problems: dict[str, str]) -> Found:
    """Read what the finished runs have left; a score of another protocol than the baseline's is left out and named."""
    told: dict[str, dict[int, dict[str, Any]]] = {row.name: {} for row in rows}
    values: Values = {key_of(metric): {row.name: {} for row in rows} for metric in study.metrics}
    names = {key_of(metric): metric.name for metric in study.metrics}
    protocols: dict[str, dict[str, Any]] = {}
    problems = dict(problems)
    for run in sorted(runs, key=lambda run: run.row != study.reference):  # the baseline first: it sets the protocols
        mark = finished(run)
        told[run.row][run.seed] = {"state": _state(run, bool(mark), run.name in problems), **_seconds(mark)}
        if not mark:
            continue
        for metric in study.metrics:
            key = key_of(metric)
            value, name, protocol = _value(RunFiles(run.folder), metric)
            unlike = comparable(protocols.setdefault(key, protocol), protocol) if protocol else []
            if unlike:
                problems[run.name] = f"{name} was measured under another {', '.join(unlike)} than the baseline's"
            elif value is None:
                problems.setdefault(run.name, f"no score {metric.name} of {metric.subject}; see its study.log")
            else:
                values[key][run.row][run.seed], names[key] = value, name
    seeds, lines = sorted({run.seed for run in runs}), _lines(study, rows, runs, problems)
    return Found(
        study=study, rows=rows, seeds=seeds, values=values, names=names, protocols=protocols, runs=told, lines=lines,
        courses={name: course(each.values()) for name, each in lines.items()}, problems=problems,
    )  # fmt: skip


def _lines(
    study: StudyConfig, rows: Sequence[Row], runs: Sequence[Run], problems: dict[str, str]
) -> dict[str, dict[int, Line]]:
    """The study's curve of each row; a run whose scores are of another protocol than the baseline's is left out."""
    curve, protocol = study.curve, dict[str, Any]()
    kept: dict[str, dict[int, Line]] = {row.name: {} for row in rows}
    for run in sorted(filter(finished, runs), key=lambda run: run.row != study.reference):
        protocol = protocol or curve_protocol(curve, run)
        unlike = unlike_scores(curve, run, protocol)
        if unlike:
            problems.setdefault(run.name, f"its {curve.name} was measured under another {', '.join(unlike)}")
        else:
            kept[run.row][run.seed] = line_of(curve, run)
    return kept


def grouped(study: StudyConfig) -> list[GroupConfig]:
    """The study's groups, then one of the rows that are in none."""
    inside = {row for group in study.groups for row in group.rows}
    others = tuple(name for name in study.names if name not in inside)
    title = "Other rows" if study.groups else "Results"
    return [*study.groups, *([GroupConfig(title=title, rows=others)] if others else [])]


def label_of(found: Found, metric: MetricConfig) -> str:
    """What a metric is called, with its unit, its features and which way is better."""
    arrow = "\N{UPWARDS ARROW}" if metric.better == "higher" else "\N{DOWNWARDS ARROW}"
    if metric.name == SPEED:
        return f"Images per second in training {arrow}"
    name = found.names[key_of(metric)]
    features = (found.protocols.get(key_of(metric), {}).get("features") or {}).get("name")
    kind = kind_of(name)
    text = kind.label + (f" ({features})" if features else "") + (f", {kind.unit}" if kind.unit else "")
    owner = "" if {each.subject for each in found.study.metrics} == {metric.subject} else f"{metric.subject}: "
    return f"{owner}{text} {arrow}"


def scale_of(name: str) -> float:
    """By what a score is multiplied to be shown: 100 where it is shown in per cent."""
    return 100.0 if kind_of(name).unit == PERCENT else 1.0


def _value(files: RunFiles, metric: MetricConfig) -> tuple[float | None, str, dict[str, Any]]:
    """A run's value of a metric, its whole name, and its protocol."""
    if metric.name == SPEED:
        rates = [line["samples_per_second"] for line in files.metrics(metric.subject) if "samples_per_second" in line]
        return (statistics.median(rates) if rates else None), SPEED, {}
    record = find(files.scores(), metric.subject, metric.name)
    return (record["value"], record["name"], record["protocol"]) if record else (None, metric.name, {})


def _state(run: Run, done: bool, failed: bool) -> str:
    changed = changed_settings(run)
    if done or failed:
        return "done" if done else "failed"
    return f"done under another {', '.join(changed)}" if changed else "not done"


def _seconds(mark: dict[str, Any]) -> dict[str, Any]:
    return {"seconds": mark.get("seconds")} if mark else {}
