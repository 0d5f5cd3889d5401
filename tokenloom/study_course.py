"""The course of a training in a study: a key of its log, or a score of its snapshots and of its end, over all seeds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from eval.protocol import Record, comparable
from eval.statistics import Estimate
from tokenloom.run_files import RunFiles
from tokenloom.score_table import find
from tokenloom.study_config import CurveConfig
from tokenloom.study_plan import Row, Run, train_of
from tokenloom.study_statistics import mean_interval

Line = dict[int, float]
"""The curve of one run: a value by training step."""
Course = dict[int, tuple[Estimate, int]]
"""By training step, the mean over seeds with its interval, and the number of seeds."""


def check_curve(curve: CurveConfig, rows: Sequence[Row]) -> None:
    """Raise ValueError if the curve is of a stage that is not trained, or of snapshots that are not taken."""
    stages = dict.fromkeys(stage for row in rows for stage in row.costs)
    if curve.stage not in stages:
        raise ValueError(f"study.curve.stage={curve.stage} is not trained by this study: it trains {', '.join(stages)}")
    for row in (row for row in rows if curve.score is not None and curve.stage in row.costs):
        if not row.experiment.eval.snapshots or not train_of(row.experiment, curve.stage).snapshot_every:
            raise ValueError(
                f"study.curve.score={curve.score} is taken of snapshots: set eval.snapshots=true and"
                f" {curve.stage}.train.snapshot_every above 0, or leave study.curve.score out"
            )


def course(lines: Iterable[Line]) -> Course:
    """The mean of a row's curves, at the steps that all of them have."""
    lines = [line for line in lines if line]
    shared = sorted(set.intersection(*map(set, lines))) if lines else []
    return {step: (mean_interval([line[step] for line in lines]), len(lines)) for step in shared}


def unlike_scores(curve: CurveConfig, run: Run, protocol: dict[str, Any]) -> list[str]:
    """In what the scores of a run's curve were measured otherwise than `protocol` says."""
    found = _scores(curve, run)
    return [key for _, record in found for key in comparable(protocol, record["protocol"])]


def curve_protocol(curve: CurveConfig, run: Run) -> dict[str, Any]:
    """What the scores of a run's curve were measured under; empty if there are none."""
    return next((record["protocol"] for _, record in _scores(curve, run)), {})


def line_of(curve: CurveConfig, run: Run) -> Line:
    """The curve of one run, steps rising; what is not finite is left out."""
    if curve.score is not None:
        found = {step: record["value"] for step, record in _scores(curve, run)}
    else:
        lines = RunFiles(run.folder).metrics(curve.stage)
        found = {line["step"]: line[curve.metric] for line in lines if curve.metric in line}
    finite = {step: value for step, value in found.items() if isinstance(value, float | int) and math.isfinite(value)}
    return dict(sorted(finite.items()))


def _scores(curve: CurveConfig, run: Run) -> Iterator[tuple[int, Record]]:
    """Scores of the snapshots, and of the trained model as that of the last step."""
    if curve.score is None:
        return
    records = RunFiles(run.folder).scores()
    last = train_of(run.experiment, curve.stage).steps
    for subject in dict.fromkeys(record["subject"] for record in records):
        step = re.fullmatch(rf"{curve.stage}@step(\d+)", subject)
        record = find(records, subject, curve.score)
        if record is not None and (step or subject == curve.stage):
            yield (int(step[1]) if step else last), record
