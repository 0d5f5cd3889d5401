"""results.md of a study: tables of means, of differences and of steps to reach, and how all was measured."""

from __future__ import annotations

import time
from collections.abc import Sequence

from engine.config import to_dict
from eval.statistics import Estimate
from generator.config import AutoregressiveSampleConfig, DiffusionSampleConfig
from tokenloom.dry_run import quantity
from tokenloom.score_table import kind_of, written
from tokenloom.study_config import GroupConfig, MetricConfig
from tokenloom.study_reach import REACH_RULE, reach_table, told_reach
from tokenloom.study_results import Found, grouped, key_of, label_of
from tokenloom.study_statistics import excludes_zero

SAMPLING = ("solver", "num_steps", "steps", "guidance", "temperature", "top_k", "top_p")  # told even if not changed


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


def _table(found: Found, names: Sequence[str]) -> str:
    """Means with their intervals."""
    lines = [["row", "seeds", "steps", *(label_of(found, metric) for metric in found.study.metrics)]]
    for row in (row for name in names for row in found.rows if row.name == name):
        seeds = sum(told["state"] == "done" for told in found.runs[row.name].values())
        steps = " + ".join(f"{count:,}" for count in row.steps.values())
        cells = (_cell(found, metric, found.mean(key_of(metric), row.name)) for metric in found.study.metrics)
        lines.append([row.name, str(seeds), steps, *cells])
    return markdown_table(lines)


def _differences(found: Found, group: GroupConfig) -> str:
    """Differences from the group's baseline, with paired intervals; bold where these leave out 0."""
    reference, metrics = found.study.baseline_of(group), found.study.metrics
    lines = [[f"minus {reference}", *(label_of(found, metric) for metric in metrics)]]
    for name in (name for name in group.rows if name != reference):
        told = (found.difference(key_of(metric), name, reference) for metric in metrics)
        lines.append([name, *(_cell(found, *each, signed=True) for each in zip(metrics, told, strict=True))])
    return markdown_table(lines) if len(lines) > 1 else ""


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
    return f"{title}\n\n{markdown_table(lines)}"


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
        parts += [head, markdown_table(reach_table(baseline, reached)), told]
    return parts


def _cell(found: Found, metric: MetricConfig, result: tuple[Estimate, int] | None, *, signed: bool = False) -> str:
    """The cell of a metric."""
    return _shown(found, found.names[key_of(metric)], result, signed=signed)


def _shown(found: Found, name: str, result: tuple[Estimate, int] | None, *, signed: bool = False) -> str:
    """`24.51 (24.32 to 24.70)`; n is told where it is not the number of seeds."""
    if result is None:
        return "\N{EN DASH}"
    (value, interval), n = result
    reach = max(abs(value), (interval[1] - interval[0]) / 2) if signed and interval else value

    def shown(number: float) -> str:
        text = written(name, number, like=reach)  # digits of a small difference say no more than its interval
        return f"+{text}" if signed and number > 0 else text

    text = shown(value) + (f" ({shown(interval[0])} to {shown(interval[1])})" if interval else "")
    text = f"**{text}**" if signed and excludes_zero(Estimate(value, interval)) else text
    return text + (f" n={n}" if n != len(found.seeds) else "")


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


def markdown_table(lines: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """A table whose first line is its head; the first columns, as many as `words`, are aligned left."""
    head, *rest = lines
    ruler = ["---" if column < words else "--:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ruler, *rest))
