"""What a study has found: values of every run, means with intervals, results.json and results.md."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.config import to_dict
from eval.protocol import comparable
from eval.statistics import Estimate
from generator.config import AutoregressiveSampleConfig, DiffusionSampleConfig
from tokenloom.dry_run import quantity
from tokenloom.run_files import RunFiles
from tokenloom.score_table import PERCENT, UP, find, kind_of, written
from tokenloom.study_config import GroupConfig, MetricConfig, StudyConfig
from tokenloom.study_course import Course, Line, course, curve_protocol, line_of, unlike_scores
from tokenloom.study_jobs import changed_settings, finished
from tokenloom.study_plan import Row, Run
from tokenloom.study_reach import REACH_RULE, Reach, reach, reach_table, told_reach
from tokenloom.study_statistics import CONFIDENCE, excludes_zero, mean_interval, paired_difference

SPEED = "images_per_second"
SAMPLING = ("solver", "num_steps", "steps", "guidance", "temperature", "top_k", "top_p")  # told even if not changed
MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
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
        if curve.score is None or curve.stage not in rows[baseline].steps:
            return None
        mine, other = rows[row].costs.get(curve.stage), rows[baseline].costs[curve.stage]
        price = mine.own / other.own if mine and self.study.budget == "flops" else 1.0
        return reach(
            self.lines[row], self.lines[baseline], total=rows[baseline].steps[curve.stage],
            higher=kind_of(curve.score).better == UP, price=price,
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


def results_json(found: Found) -> dict[str, Any]:
    """All values, means and differences, JSON-ready; `groups` of a row has those from its groups' baselines."""
    rows = dict[str, dict[str, Any]]()
    for row in found.rows:
        rows[row.name] = {
            "values": row.values,
            "steps": row.steps,
            "flops": row.flops,
            "runs": {
                str(seed): {**told, "scores": _scores(found, row.name, seed)}
                for seed, told in sorted(found.runs[row.name].items())
            },
            "means": {key: _stated(found.mean(key, row.name)) for key in found.values},
            "differences": {key: _stated(found.difference(key, row.name)) for key in found.values},
            "groups": {
                group.title: _in_group(found, row.name, found.study.baseline_of(group))
                for group in grouped(found.study)
                if row.name in group.rows
            },
        }
    metrics = {key: {"name": name, "protocol": found.protocols.get(key)} for key, name in found.names.items()}
    if found.study.curve.score is not None:
        for name, line in found.courses.items():
            rows[name]["curve"] = {str(step): _stated(value) for step, value in line.items()}
            for seed, values in found.lines[name].items():
                rows[name]["runs"][str(seed)]["curve"] = {str(step): value for step, value in values.items()}
    study = to_dict(found.study)
    del study["rows"]
    facts = {"confidence": CONFIDENCE, "interval": "Student t over seeds", "baseline": found.study.reference}
    return {"study": study, **facts, "metrics": metrics, "rows": rows, "problems": found.problems}


def results_markdown(found: Found) -> str:
    """Title, question, how it was measured, and for each group a table of means and one of differences."""
    study = found.study
    parts = [f"# {study.title}", study.question, _told_budget(found), _told_statistics(found)]
    for group in grouped(study):
        parts += [f"## {group.title}", _table(found, group.rows), _differences(found, group)]
    parts += [_by_steps(found), *_by_reach(found)]
    parts += [_told_measurement(found), _told_sampling(found), "![Scores of every seed, with intervals](plot.png)"]
    parts.append(f"![{study.curve.name} in the course of the training](curves.png)")
    if found.problems:
        listed = "\n".join(f"- {name}: {trouble}" for name, trouble in found.problems.items())
        parts.append(f"## What went wrong\n\n{listed}")
    return "\n\n".join(part for part in parts if part) + "\n"


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


def _scores(found: Found, row: str, seed: int) -> dict[str, float]:
    return {key: table[row][seed] for key, table in found.values.items() if seed in table[row]}


def _stated(result: tuple[Estimate, int] | None) -> dict[str, Any] | None:
    if result is None:
        return None
    (value, interval), n = result
    return {"value": value, "interval": list(interval) if interval else None, "n": n}


def _table(found: Found, names: Sequence[str]) -> str:
    """Means with their intervals."""
    lines = [["row", "seeds", "steps", *(label_of(found, metric) for metric in found.study.metrics)]]
    for row in (row for name in names for row in found.rows if row.name == name):
        seeds = sum(told["state"] == "done" for told in found.runs[row.name].values())
        steps = " + ".join(f"{count:,}" for count in row.steps.values())
        cells = (_cell(found, metric, found.mean(key_of(metric), row.name)) for metric in found.study.metrics)
        lines.append([row.name, str(seeds), steps, *cells])
    return _markdown(lines)


def _in_group(found: Found, row: str, baseline: str) -> dict[str, Any]:
    """A row against the baseline of a group, JSON-ready."""
    differences = {key: _stated(found.difference(key, row, baseline)) for key in found.values}
    told: dict[str, Any] = {"baseline": baseline, "differences": differences}
    curve, each = found.study.curve, found.reach(row, baseline)
    if curve.score is not None:
        told["sentence"] = told_reach(row, baseline, curve.score, each)
    if each is not None:
        told["reach"] = _reach_json(each)
    return told


def _reach_json(each: Reach) -> dict[str, Any]:
    """Steps by seed and what they come to, JSON-ready."""
    means = {"mean_steps": each.mean_steps, "speed_up": each.speed_up}
    return {
        "of_steps": each.total,
        "reached": each.reached,
        "steps": {str(seed): step for seed, step in each.steps.items()},
        "baseline_steps": {str(seed): step for seed, step in each.baseline_steps.items()},
        **{key: None if mean is None else _stated((mean, len(each.steps))) for key, mean in means.items()},
    }


def _differences(found: Found, group: GroupConfig) -> str:
    """Differences from the group's baseline, with paired intervals; bold where these leave out 0."""
    reference, metrics = found.study.baseline_of(group), found.study.metrics
    lines = [[f"minus {reference}", *(label_of(found, metric) for metric in metrics)]]
    for name in (name for name in group.rows if name != reference):
        told = (found.difference(key_of(metric), name, reference) for metric in metrics)
        lines.append([name, *(_cell(found, *each, signed=True) for each in zip(metrics, told, strict=True))])
    return _markdown(lines) if len(lines) > 1 else ""


def _by_steps(found: Found) -> str:
    """The score that the study's curve shows: a table with a column for each step; empty if it is of no score."""
    curve = found.study.curve
    if curve.score is None:
        return ""
    steps = sorted({step for line in found.courses.values() for step in line})
    lines = [["row", *(f"{step:,}" for step in steps)]]
    for row in found.rows:
        lines.append([row.name, *(_shown(found, curve.score, found.courses[row.name].get(step)) for step in steps)])
    title = f"## {kind_of(curve.score).label} of the {curve.stage} samples by training steps"
    return f"{title}\n\n{_markdown(lines)}"


def _by_reach(found: Found) -> list[str]:
    """Steps to reach the final score of each group's baseline: the rule, then tables and sentences; empty as above."""
    score = found.study.curve.score
    if score is None:
        return []
    label = kind_of(score).label
    parts = [f"## Steps to reach the baseline's final {label}", REACH_RULE]
    for group in grouped(found.study):
        baseline = found.study.baseline_of(group)
        reached = {name: found.reach(name, baseline) for name in (baseline, *group.rows)}
        told = "\n".join(f"- {told_reach(name, baseline, score, each)}" for name, each in reached.items())
        head = f"### {group.title}: the final {label} of {baseline}"
        parts += [head, _markdown(reach_table(baseline, reached)), told]
    return parts


def _cell(found: Found, metric: MetricConfig, result: tuple[Estimate, int] | None, *, signed: bool = False) -> str:
    """The cell of a metric."""
    return _shown(found, found.names[key_of(metric)], result, signed=signed)


def _shown(found: Found, name: str, result: tuple[Estimate, int] | None, *, signed: bool = False) -> str:
    """`24.51 (24.32 to 24.70)`; n is told where it is not the number of seeds."""
    if result is None:
        return "\N{EN DASH}"
    (value, interval), n = result

    def shown(number: float) -> str:
        text = written(name, number, like=value)
        return f"+{text}" if signed and number > 0 else text

    text = shown(value) + (f" ({shown(interval[0])} to {shown(interval[1])})" if interval else "")
    text = f"**{text}**" if signed and excludes_zero(Estimate(value, interval)) else text
    return text + (f" n={n}" if n != len(found.seeds) else "")


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    ruler = ["---", *("--:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ruler, *rest))


def _told_budget(found: Found) -> str:
    reference = next(row for row in found.rows if row.name == found.study.reference)
    parts = [
        f"{count:,} steps of {getattr(reference.experiment, stage).train.batch_size} images for the {stage}"
        for stage, count in reference.steps.items()
    ]
    cost = f"{quantity(reference.flops, 'FLOP')} in all"
    what = {"flops": "FLOPs of training", "steps": "training steps"}[found.study.budget]
    shared = " All rows take one tokenizer and its codes." if found.study.stages == "generator" else ""
    return f"Every row has the same {what}.{shared} The baseline `{reference.name}`: {', '.join(parts)}, {cost}."


def _told_statistics(found: Found) -> str:
    seeds = ", ".join(map(str, found.seeds))
    same = "the test images are" if found.study.stages == "tokenizer" else "real images and the samples' noise are"
    if len(found.seeds) == 1:
        return f"One seed, {seeds}, hence no intervals. Written {time.strftime('%Y-%m-%d')}."
    return (
        f"Means over the seeds {seeds} with 95 % intervals by Student's t. Seeds change weights and order of the data; "
        f"{same} the same. Differences are paired by seed; those whose interval leaves out 0 are bold. "
        f"Intervals are not widened for the number of rows. Written {time.strftime('%Y-%m-%d')}."
    )


def _told_sampling(found: Found) -> str:
    """How the baseline's samples were drawn, subject by subject."""
    told, usual = {}, {**to_dict(AutoregressiveSampleConfig()), **to_dict(DiffusionSampleConfig())}
    for metric in found.study.metrics:
        facts = found.protocols.get(key_of(metric), {}).get("subject") or {}
        settings = facts.get("settings") or {}
        shown = ", ".join(
            f"{key} {value}"
            for key, value in settings.items()
            if key in SAMPLING or (key != "batch_size" and value != usual.get(key))
        )
        if shown:
            told[metric.subject] = f"`{metric.subject}`: {shown}"
    return f"How the baseline's samples were drawn: {'; '.join(told.values())}." if told else ""


def _told_measurement(found: Found) -> str:
    facts = [protocol for protocol in found.protocols.values() if protocol]
    if not facts:
        return ""
    data = facts[0].get("data") or {}
    made, real = facts[0].get("num_generated"), facts[0].get("num_real", 0)
    images = f"{made:,} samples against {real:,} training images" if made else f"{real:,} test images"
    images += f" of {facts[0].get('size')} pixels"
    origin = data.get("name") or data.get("path") or data.get("source")
    features = {told["name"]: told["weights"][:8] for fact in facts if (told := fact.get("features"))}
    judged = "".join(f"; features {name} ({weights})" for name, weights in features.items())
    return f"Scored on {images}{f' ({origin})' if origin else ''}{judged}; judge version {facts[0].get('judge')}."
