"""From a study to its runs: every row an experiment of equal cost, every seed of it an ordinary run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.config import RunConfig, TrainConfig, to_dict
from engine.device import cpu_quota
from engine.log import clock
from tokenloom.dry_run import quantity
from tokenloom.experiment import Experiment
from tokenloom.run_files import RunFiles
from tokenloom.study_config import SHARED, StudyConfig, vary
from tokenloom.study_costs import Cost, product_rate, sampling_seconds, step_seconds, training_costs
from tokenloom.study_taken import Taken, check_taken, taken_by, told_taken, with_folders


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

    @property
    def taken(self) -> dict[str, str]:
        """Rows whose networks it takes, by the key of diffusion.sample."""
        return taken_by(self.experiment)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row under one seed; or the tokenizer that all rows share, under the row name SHARED."""

    row: str
    seed: int
    experiment: Experiment
    flops: float
    taken: Taken = field(default_factory=dict)
    """Rows whose networks of the same seed it takes, by the key of diffusion.sample."""

    @property
    def name(self) -> str:
        return f"{self.row} seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.experiment.run.folder

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the scores, JSON-ready; no folder. Of another run's tokenizer: what it is, and how it
        encoded. Of another row's network: the row, and what the network is."""
        told = to_dict(self.experiment)
        run = {key: told["run"][key] for key in ("seed", "precision")}
        for key, row in self.taken.items():
            network = RunFiles(Path(told["diffusion"]["sample"][key])).card("diffusion")
            told["diffusion"]["sample"][key] = {"row": row, "fingerprint": network.get("fingerprint")}
        if self.experiment.run.tokenizer is None:
            return {**told, "run": run}
        files = RunFiles(self.experiment.run.tokenizer_folder)
        taken = {"fingerprint": files.card("tokenizer").get("fingerprint"), "augmentation": files.augmentation()}
        return {**told, "run": run, "tokenizer": taken}


def plan_rows(study: StudyConfig, base: Experiment) -> list[Row]:
    """All rows in the study's order, with as many steps as the budget gives them.

    Raises:
        ValueError: a row does not fit, trains nothing, takes the network of a row that cannot give it, or its steps do
            not outlast its warm-up.
    """
    if base.run.tokenizer is not None:
        _check_borrowing(study, base.run.tokenizer)
    drafts = []
    for row in study.rows:
        experiment = vary(base, row)
        if study.stages == "tokenizer":
            experiment = without_generators(experiment)
        costs = training_costs(experiment)
        if study.stages == "generator":
            costs.pop("tokenizer", None)
        if not costs:
            raise ValueError(f"study.rows.{row.name}: there is no section autoregressive or diffusion to train")
        drafts.append(Row(name=row.name, values=row.values, experiment=experiment, costs=costs))
    _check_networks(study, drafts)
    if study.budget == "steps":
        return drafts
    reference = next(row for row in drafts if row.name == study.reference)
    return [_within_budget(row, reference) for row in drafts]


def _check_borrowing(study: StudyConfig, tokenizer: str) -> None:
    """Raise ValueError if a study is about tokenizers, although all its runs take that of another run."""
    if study.stages == "tokenizer":
        raise ValueError(f"run.tokenizer={tokenizer}: this study trains tokenizers; leave the key out")
    for row in study.rows:
        for key in (key for key in row.values if key.split(".")[0] == "tokenizer"):
            told = f"run.tokenizer={tokenizer} makes all rows take one tokenizer; leave it out"
            raise ValueError(f"study.rows.{row.name}.{key} changes nothing: {told}")


def _check_networks(study: StudyConfig, rows: Sequence[Row]) -> None:
    """Raise ValueError unless each network that a row takes is that of a row of the same tokenizer."""
    check_taken({row.name: row.experiment for row in rows})
    makers = [row for row in rows if study.stages == "all" and row.experiment.run.tokenizer is None]
    for row in (row for row in makers if row.taken):
        key, provider = next(iter(row.taken.items()))
        where = f"study.rows.{row.name}.diffusion.sample.{key}=row:{provider}"
        raise ValueError(f"{where}: with study.stages=all each row makes a tokenizer of its own; set it to generator")


def plan_runs(study: StudyConfig, rows: Sequence[Row], seeds: Sequence[int], base: RunConfig) -> list[Run]:
    """All runs, seed by seed, so that an unfinished study has whole seeds to compare."""
    folder, threads = base.folder, threads_each(study, base)
    tokenizer = str(folder / SHARED) if study.stages == "generator" and base.tokenizer is None else base.tokenizer
    runs = []
    for seed in seeds:
        for row in rows:
            run = dataclasses.replace(
                row.experiment.run, root=str(folder / row.name), name=f"seed-{seed}", seed=seed, threads=threads,
                tokenizer=tokenizer,
            )  # fmt: skip
            networks = {key: folder / provider / run.name for key, provider in row.taken.items()}
            experiment = with_folders(dataclasses.replace(row.experiment, run=run), networks)
            runs.append(Run(row=row.name, seed=seed, experiment=experiment, flops=row.flops, taken=row.taken))
    return runs


def shared_run(study: StudyConfig, base: Experiment) -> Run | None:
    """The run that makes the tokenizer and the codes of all rows; None if each makes its own, or they are there."""
    if study.stages != "generator" or base.run.tokenizer is not None:
        return None
    run = dataclasses.replace(base.run, root=str(base.run.folder), name=SHARED)
    experiment = without_generators(dataclasses.replace(base, run=run))
    learned = training_costs(experiment).get("tokenizer")  # pixels have nothing to train
    flops = learned.total(base.tokenizer.train.steps) if learned else 0.0
    return Run(row=SHARED, seed=run.seed, experiment=experiment, flops=flops)


def without_generators(experiment: Experiment) -> Experiment:
    """The tokenizer's part of an experiment: no generators, and no ways to sample from them."""
    scored = dataclasses.replace(experiment.eval, variants={}, snapshots=False)
    return dataclasses.replace(experiment, autoregressive=None, diffusion=None, eval=scored)


def threads_each(study: StudyConfig, base: RunConfig) -> int:
    """CPU threads of each of the runs that go on together."""
    return base.threads or max(1, cpu_quota() // study.jobs)


def train_of(experiment: Experiment, stage: str) -> TrainConfig:
    """The training section of a stage."""
    return getattr(experiment, stage).train


def tell_plan(
    study: StudyConfig, rows: Sequence[Row], base: RunConfig, seeds: Sequence[int], *, left: int, first: Run | None
) -> str:
    """Rows, steps, FLOPs and time, as a dry run tells them; the time is measured on the way.

    `first` is the run that makes the tokenizer of all rows, if there is one and it is not done.
    """
    threads = threads_each(study, base)
    torch.set_num_threads(threads)
    rate = product_rate(base)
    times = [_run_times(study, row, rate) for row in rows]
    training, sampling = (sum(each[part] for each in times) * len(seeds) / study.jobs for part in ("train", "sample"))
    cost = [f"training alone, {study.jobs} at a time on {threads} threads each: about {clock(training)} in all"]
    if first is not None and first.experiment.tokenizer.model.learned:
        steps = first.experiment.tokenizer.train.steps
        seconds = steps * step_seconds(first.experiment, rate)[0]["tokenizer"]
        cost.append(f"before it one tokenizer for all rows, {steps:,} steps: about {clock(seconds)}")
    if sampling:
        passes = "forward passes alone, variants and snapshots included"
        cost.append(f"sampling for the scores, {passes}: about {clock(sampling)} more")
    count = f"{len(rows)} rows x {len(seeds)} seeds ({', '.join(map(str, seeds))}) = {len(rows) * len(seeds)} runs"
    head = [study.title, f"{count}, {left} not done, in {base.folder}/"]
    told = "; ".join(dict.fromkeys(each["way"] for each in times))
    waits = told_taken([(row.name, row.taken) for row in rows])
    return "\n".join([*head, "", *_row_lines(rows, times), "", *waits, *cost, f"time {told}"])


def _run_times(study: StudyConfig, row: Row, rate: float) -> dict[str, Any]:
    """Seconds that one run of a row trains and samples for its scores, and how they were found."""
    per_step, way = step_seconds(row.experiment, rate)
    train = sum(row.steps[stage] * per_step[stage] for stage in row.costs)
    sample = 0.0 if study.stages == "tokenizer" else sampling_seconds(row.experiment, rate)
    return {"train": train, "sample": sample, "way": way}


def _row_lines(rows: Sequence[Row], times: Sequence[dict[str, Any]]) -> list[str]:
    """The table of a dry run."""
    sampled = any(each["sample"] for each in times)
    extra = ("sampling per run",) if sampled else ()
    lines: list[tuple[str, ...]] = [("row", "steps", "FLOP per run", "time per run", *extra, "what differs")]
    for row, each in zip(rows, times, strict=True):
        steps = " + ".join(f"{count:,}" for count in row.steps.values())
        changes = ", ".join(f"{_short_key(key)}={_short(value)}" for key, value in row.values.items())
        seconds = (clock(each["train"]), *((clock(each["sample"]),) if sampled else ()))
        lines.append((row.name, steps, quantity(row.flops, "FLOP"), *seconds, changes or "the base"))
    return _aligned(lines)


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


def _short_key(key: str) -> str:
    """Its last word; of a kind also what it is of."""
    words = key.split(".")
    return ".".join(words[-2:]) if words[-1] == "kind" else words[-1]


def _short(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
