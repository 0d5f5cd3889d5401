"""From a study to its runs: every row an experiment of equal cost, every seed of it an ordinary run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config import RunConfig, TrainConfig, to_dict
from engine.device import cpu_quota
from engine.log import clock
from tokenloom.dry_run import quantity
from tokenloom.experiment import Experiment
from tokenloom.study_config import StudyConfig, vary
from tokenloom.study_costs import Cost, product_rate, step_seconds, training_costs


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row with its steps chosen, and what a step of each of its stages costs."""

    name: str
    values: dict[str, Any]
    experiment: Experiment
    costs: dict[str, Cost]

    @property
    def steps(self) -> dict[str, int]:
        """Training steps of each stage."""
        return {stage: train_of(self.experiment, stage).steps for stage in self.costs}

    @property
    def flops(self) -> float:
        """FLOPs of the training of one run."""
        return sum(cost.total(self.steps[stage]) for stage, cost in self.costs.items())


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row under one seed."""

    row: str
    seed: int
    experiment: Experiment
    flops: float

    @property
    def name(self) -> str:
        return f"{self.row} seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.experiment.run.folder

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the scores, JSON-ready."""
        told = to_dict(self.experiment)
        return {**told, "run": {key: told["run"][key] for key in ("seed", "precision")}}


def plan_rows(study: StudyConfig, base: Experiment) -> list[Row]:
    """All rows in the study's order, with as many steps as the budget gives them.

    Raises:
        ValueError: a row does not fit, or its steps do not outlast its warm-up.
    """
    drafts = []
    for row in study.rows:
        experiment = vary(base, row)
        if study.stages == "tokenizer":
            experiment = dataclasses.replace(experiment, autoregressive=None, diffusion=None)
        costs = training_costs(experiment)
        drafts.append(Row(name=row.name, values=row.values, experiment=experiment, costs=costs))
    if study.budget == "steps":
        return drafts
    reference = next(row for row in drafts if row.name == study.reference)
    return [_within_budget(row, reference) for row in drafts]


def plan_runs(study: StudyConfig, rows: Sequence[Row], seeds: Sequence[int], base: RunConfig) -> list[Run]:
    """All runs, seed by seed, so that an unfinished study has whole seeds to compare."""
    folder, threads = base.folder, threads_each(study, base)
    runs = []
    for seed in seeds:
        for row in rows:
            run = dataclasses.replace(
                row.experiment.run, root=str(folder / row.name), name=f"seed-{seed}", seed=seed, threads=threads
            )
            experiment = dataclasses.replace(row.experiment, run=run)
            runs.append(Run(row=row.name, seed=seed, experiment=experiment, flops=row.flops))
    return runs


def threads_each(study: StudyConfig, base: RunConfig) -> int:
    """CPU threads of each of the runs that go on together."""
    return base.threads or max(1, cpu_quota() // study.jobs)


def train_of(experiment: Experiment, stage: str) -> TrainConfig:
    """The training section of a stage."""
    return getattr(experiment, stage).train


def tell_plan(study: StudyConfig, rows: Sequence[Row], base: RunConfig, seeds: Sequence[int], *, left: int) -> str:
    """Rows, steps, FLOPs and time, as a dry run tells them; the time is measured on the way."""
    threads = threads_each(study, base)
    torch.set_num_threads(threads)
    rate = product_rate(base)
    lines = [("row", "steps", "FLOP per run", "time per run", "what differs")]
    total, ways = 0.0, list[str]()
    for row in rows:
        per_step, way = step_seconds(row.experiment, rate)
        seconds = sum(row.steps[stage] * per_step[stage] for stage in row.costs)
        total += seconds * len(seeds)
        ways.append(way)
        steps = " + ".join(f"{count:,}" for count in row.steps.values())
        changes = ", ".join(f"{key.split('.')[-1]}={_short(value)}" for key, value in row.values.items())
        lines.append((row.name, steps, quantity(row.flops, "FLOP"), clock(seconds), changes or "the base"))
    count = len(rows) * len(seeds)
    seeds_told = ", ".join(map(str, seeds))
    head = f"{study.title}\n{len(rows)} rows x {len(seeds)} seeds ({seeds_told}) = {count} runs, {left} not done"
    cost = f"training alone, {study.jobs} at a time on {threads} threads each: about {clock(total / study.jobs)} in all"
    told = "; ".join(dict.fromkeys(ways))
    return "\n".join([f"{head}, in {base.folder}/", "", *_aligned(lines), "", f"{cost}", f"time {told}"])


def _within_budget(row: Row, reference: Row) -> Row:
    """The row with as many steps of each stage as cost the FLOPs of the reference's."""
    experiment = row.experiment
    for stage, cost in row.costs.items():
        if stage not in reference.costs:
            told = "study.budget=flops has nothing to hold it against: use study.budget=steps"
            raise ValueError(f"study.rows.{row.name} trains {stage}, the row {reference.name} does not; {told}")
        steps = cost.steps_within(reference.costs[stage].total(reference.steps[stage]))
        section = getattr(experiment, stage)
        if steps <= section.train.warmup_steps:
            limit = f"no more than {stage}.train.warmup_steps={section.train.warmup_steps}"
            raise ValueError(f"study.rows.{row.name}: the budget is {steps} steps, {limit}; raise {stage}.train.steps")
        section = dataclasses.replace(section, train=dataclasses.replace(section.train, steps=steps))
        experiment = dataclasses.replace(experiment, **{stage: section})
    return dataclasses.replace(row, experiment=experiment)


def _short(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
