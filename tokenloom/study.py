"""The door of studies: plan the rows, do what is not done, write results.json, results.md, plot.png and curves.png."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.checkpoint import write_atomic, write_json
from eval.variants import check_samplings, samplings
from tokenloom.difficulty import check_difficulty, write_difficulty
from tokenloom.dry_run import num_classes
from tokenloom.experiment import Experiment
from tokenloom.pipeline import check_tokenizer
from tokenloom.report import BASELINES
from tokenloom.study_config import StudyConfig, check_names, study_yaml
from tokenloom.study_course import check_curve
from tokenloom.study_jobs import carry_out, finished
from tokenloom.study_json import results_json
from tokenloom.study_markdown import results_markdown
from tokenloom.study_plan import Row, Run, plan_rows, plan_runs, shared_run, tell_plan
from tokenloom.study_plot import curves, number_at, plot
from tokenloom.study_results import Found, gather
from tokenloom.study_taken import with_taken, without_taken


def run_study(
    study: StudyConfig,
    base: Experiment,
    *,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    report_only: bool = False,
) -> Found:
    """Carry out a study, or of it the rows `only` and the given seeds, and write the results of all that is there.

    Rows whose networks the rows `only` take are carried out too.

    Raises:
        ValueError: a row does not fit or is not known.
        Interrupted: a signal came; the same call goes on.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a study starts its runs by itself: call it without torchrun, and set study.jobs")
    check_names(only, study.names, "--only")
    rows, folder = checked_rows(study, base), base.run.folder
    runs = plan_runs(study, rows, sorted({*study.seeds, *seeds}), base.run)
    chosen = with_taken(only or study.names, {row.name: row.taken for row in rows})
    wanted = [run for run in runs if run.row in chosen and run.seed in (seeds or study.seeds)]
    problems: dict[str, str] = {}
    if not report_only:
        write_atomic(folder / "study.yaml", study_yaml(study, base).encode())
        problems = _share(study, base, wanted)
        problems |= {} if problems else carry_out(wanted, stages=study.stages, jobs=study.jobs, title=study.title)
    found = gather(study, rows, runs, problems)
    print(f"results: {write_results(found, folder)}")
    if study.difficulty:
        print(f"difficulty: {write_difficulty(study, rows, runs, found.problems, folder)}")
    return found


def _share(study: StudyConfig, base: Experiment, wanted: Sequence[Run]) -> dict[str, str]:
    """See to the tokenizer and the codes that all rows take, if they do; returns what went wrong, by name of the run.

    Raises:
        ValueError: run.tokenizer names a run without them.
    """
    if study.stages != "generator" or all(map(finished, wanted)):
        return {}
    shared = shared_run(study, base)
    if shared is None:
        check_tokenizer(base)
        return {}
    return carry_out([shared], stages="shared", jobs=1, title="one tokenizer for all rows")


def tell(study: StudyConfig, base: Experiment, *, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> str:
    """What a study would do and how long that would take; nothing is trained or written.

    Raises:
        ValueError: a row does not fit or is not known.
    """
    check_names(only, study.names, "--only")
    rows = checked_rows(study, base)
    wanted = with_taken(only or study.names, {row.name: row.taken for row in rows})
    rows = [row for row in rows if row.name in wanted]
    chosen = sorted(seeds or study.seeds)
    left = sum(not finished(run) for run in plan_runs(study, rows, chosen, base.run))
    shared = shared_run(study, base)
    first = None if shared is None or finished(shared) else shared
    return tell_plan(study, rows, base.run, chosen, left=left, first=first)


def checked_rows(study: StudyConfig, base: Experiment) -> list[Row]:
    """The planned rows; what the pictures would need after hours of training is asked for now."""
    rows = plan_rows(study, base)
    for group in (group for group in study.groups if group.x):
        for row in (row for row in rows if row.name in group.rows):
            number_at(row, group.x or "")
    check_curve(study.curve, rows)
    check_difficulty(study, rows)
    check_samples(study, rows)
    return rows


def check_samples(study: StudyConfig, rows: Sequence[Row]) -> None:
    """Raise ValueError if a score is asked of what no row scores, or of samples that cannot be drawn as a row says."""
    scored = {"tokenizer": ["tokenizer"], "generator": ["real"], "all": ["real", "tokenizer", *BASELINES]}[study.stages]
    for experiment in (without_taken(row.experiment) for row in rows):
        families = dict(experiment.generators())
        check_samplings(experiment.eval, families, classes=num_classes(experiment)[0], run=experiment.run.folder)
        scored += [each.subject for each in samplings(experiment.eval, families) if each.subject not in scored]
    own = tuple(f"{family}@{kind}" for family in ("autoregressive", "diffusion") for kind in ("accept", "step"))
    check_names([each.subject for each in study.metrics if not each.subject.startswith(own)], scored, "study.metrics")


def write_results(found: Found, folder: Path) -> Path:
    """results.json, results.md, plot.png and curves.png in the study's folder; returns results.md."""
    write_json(folder / "results.json", results_json(found))
    write_atomic(folder / "plot.png", plot(found))
    write_atomic(folder / "curves.png", curves(found))
    write_atomic(folder / "results.md", results_markdown(found).encode())
    return folder / "results.md"


def complain(found: Found) -> None:
    """Name on stderr what went wrong, and end with exit code 1 if anything did."""
    for name, trouble in found.problems.items():
        print(f"tokenloom study: {name}: {trouble}", file=sys.stderr)
    if found.problems:
        raise SystemExit(1)
