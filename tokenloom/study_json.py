"""results.json of a study: all values, means, differences and steps to reach."""

from __future__ import annotations

from typing import Any

from engine.config import to_dict
from tokenloom.study_reach import Reach, told_reach
from tokenloom.study_results import Found, grouped
from tokenloom.study_statistics import CONFIDENCE, stated


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
            "means": {key: stated(found.mean(key, row.name)) for key in found.values},
            "differences": {key: stated(found.difference(key, row.name)) for key in found.values},
            "groups": {
                group.title: _in_group(found, row.name, found.study.baseline_of(group))
                for group in grouped(found.study)
                if row.name in group.rows
            },
        }
    metrics = {key: {"name": name, "protocol": found.protocols.get(key)} for key, name in found.names.items()}
    if found.study.curve.score is not None:
        for name, line in found.courses.items():
            rows[name]["curve"] = {str(step): stated(value) for step, value in line.items()}
            for seed, values in found.lines[name].items():
                rows[name]["runs"][str(seed)]["curve"] = {str(step): value for step, value in values.items()}
    study = to_dict(found.study)
    del study["rows"]
    facts = {"confidence": CONFIDENCE, "interval": "Student t over seeds", "baseline": found.study.reference}
    return {"study": study, **facts, "metrics": metrics, "rows": rows, "problems": found.problems}


def _scores(found: Found, row: str, seed: int) -> dict[str, float]:
    return {key: table[row][seed] for key, table in found.values.items() if seed in table[row]}


def _in_group(found: Found, row: str, baseline: str) -> dict[str, Any]:
    """A row against the baseline of a group, JSON-ready."""
    differences = {key: stated(found.difference(key, row, baseline)) for key in found.values}
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
        "at_once": each.at_once,
        "steps": {str(seed): step for seed, step in each.steps.items()},
        "baseline_steps": {str(seed): step for seed, step in each.baseline_steps.items()},
        **{key: None if mean is None else stated((mean, len(each.steps))) for key, mean in means.items()},
    }
