"""The `study` section of a YAML: which rows are compared, at what cost, over which seeds, by which scores. No torch.

The other sections of the file are the experiment that the rows vary. A row is a list of dotted keys with their values.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from engine import config
from engine.config import read_yaml, to_dict
from tokenloom.experiment import Experiment, load_experiment

Loaded = TypeVar("Loaded")
FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
SHARED = "shared"  # folder, in that of the study, of the run whose tokenizer and codes all rows take


@dataclass(frozen=True, kw_only=True)
class MetricConfig:
    name: str
    """A score, such as psnr; rfd or fd stands for that of the first features; images_per_second is training's speed."""
    subject: str = "tokenizer"
    """What is scored: tokenizer, autoregressive, diffusion; diffusion@cfg2 is the variant cfg2 of eval.variants."""
    better: Literal["higher", "lower"] = "higher"
    """Which way is better."""


@dataclass(frozen=True, kw_only=True)
class RowConfig:
    name: str
    """Name of the row and of its folder."""
    values: dict[str, Any] = field(default_factory=dict)
    """Dotted keys of the experiment with the row's values. `row:<name>` in the place of a folder, in
    diffusion.sample.guide and .outside, is that row's diffusion model under the same seed."""


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    title: str
    """Heading over the rows."""
    rows: tuple[str, ...]
    """Names of rows; a row may be in several groups."""
    baseline: str | None = None
    """The one of these rows that the others are held against here; absent: study.baseline."""
    x: str | None = None
    """Dotted key with a number, such as tokenizer.model.code_dim, over which the rows are also drawn as a line."""


@dataclass(frozen=True, kw_only=True)
class CurveConfig:
    stage: Literal["tokenizer", "autoregressive", "diffusion"] = "tokenizer"
    """The stage whose training is drawn."""
    metric: str = "validation/psnr"
    """A key of its metrics.jsonl."""
    score: str | None = None
    """A score in place of the metric, such as fd: that of every snapshot of the stage, and of its end. It takes
    eval.snapshots and diffusion.train.snapshot_every, as snapshots of the diffusion model alone are scored."""

    def __post_init__(self) -> None:
        if self.score is not None and self.stage != "diffusion":
            told = "of snapshots, and those of the diffusion model alone are scored"
            raise ValueError(f"study.curve.score={self.score} is {told}: set study.curve.stage=diffusion")
        if self.score is None and self.stage != "tokenizer" and self.metric == CurveConfig.metric:
            told = f"is a key of the tokenizer's log, not of {self.stage}'s"
            raise ValueError(f"study.curve.metric={self.metric} {told}: name another one, such as loss")

    @property
    def name(self) -> str:
        """What is drawn."""
        return self.score or self.metric


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    title: str = ""
    """Heading of the results."""
    question: str = ""
    """What the study asks, in one sentence."""
    stages: Literal["tokenizer", "generator", "all"] = "tokenizer"
    """What every run does: train the tokenizer and score its reconstructions; train the generators on one tokenizer,
    made once for all runs or that of run.tokenizer, and score their samples; or all stages."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Values of run.seed; every row is trained once with each."""
    budget: Literal["flops", "steps"] = "flops"
    """What all rows have in common: the FLOPs of the baseline's training, stage by stage, or its steps."""
    baseline: str = ""
    """The row that others are held against, unless their group has another, and whose costs they share; absent: the
    first."""
    jobs: int = 1
    """Runs at a time; they share the CPU's threads."""
    metrics: tuple[MetricConfig, ...] = ()
    """Scores to compare."""
    curve: CurveConfig = field(default_factory=CurveConfig)
    """What is drawn over the course of the training."""
    difficulty: bool = False
    """Tell which noise levels are hard, too (difficulty.md): by the rows that train on one cluster of them alone
    (diffusion.curriculum.kind=single), and by the relative entropy of consecutive marginals."""
    rows: tuple[RowConfig, ...] = ()
    """In YAML a mapping from names of rows to their dotted keys and values."""
    groups: tuple[GroupConfig, ...] = ()
    """Headings that put rows in order; rows of no group come last."""

    def __post_init__(self) -> None:
        if not self.rows or not self.metrics or not self.title:
            raise ValueError("study: title, metrics and rows must not be empty")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"study.seeds={list(self.seeds)} must be different numbers from 0 on")
        if self.jobs < 1:
            raise ValueError(f"study.jobs={self.jobs} must be at least 1")
        for row in self.rows:
            _check_row(row, self.stages)
        if len(set(self.names)) < len(self.names):
            raise ValueError("study.rows: two rows have one name")
        check_names([self.baseline] if self.baseline else [], self.names, "study.baseline")
        for group in self.groups:
            where = f"study.groups, {group.title!r}"
            check_names(group.rows, self.names, where)
            check_names([group.baseline] if group.baseline else [], group.rows, f"{where}, baseline")
        titles = [group.title for group in self.groups]
        if len(set(titles)) < len(titles):
            raise ValueError(f"study.groups: two groups have one title, of {', '.join(titles)}; rename one")

    @property
    def names(self) -> list[str]:
        """Names of the rows."""
        return [row.name for row in self.rows]

    @property
    def reference(self) -> str:
        """Name of the baseline row."""
        return self.baseline or self.rows[0].name

    def baseline_of(self, group: GroupConfig) -> str:
        """Name of the row that a group is held against."""
        return group.baseline or self.reference


@dataclass(frozen=True, kw_only=True)
class StudyFile:
    """The section that a study has beside those of an experiment."""

    study: StudyConfig
    """What is compared, and how."""


def load_study(arguments: Sequence[str]) -> tuple[StudyConfig, Experiment]:
    """A study and the experiment that it varies, from `--config FILE` and dotted overrides of either.

    Of several files later ones win, and one has the section `study`.

    Raises:
        ValueError: no file, not one study section, an unknown key, or a value that does not fit.
    """
    if {"--help", "-h"} & set(arguments):
        config.load(StudyFile, ["--help"], program="tokenloom study")  # prints every key and ends
    files, study_words, words = _sorted_words(arguments)
    path, base, sections = " + ".join(files), dict[str, Any](), list[Any]()
    for content in map(read_yaml, files):
        sections += [content.pop("study")] if "study" in content else []
        for key, value in content.items():
            _put(base, [key], value, path)
    if len(sections) != 1 or not isinstance(sections[0], dict):
        told = f"--config {path}: {len(sections) or 'no'} sections `study`" if files else "no --config FILE given"
        raise ValueError(f"{told}, a study takes one; configs/study-codebook.yaml shows one")
    section = sections[0]
    listed = {"study": _listed(section, path)}
    study = _load(lambda file: config.load(StudyFile, ["--config", file, *study_words]), listed, path).study
    return study, _load(lambda file: load_experiment(["--config", file, *words], program="tokenloom study"), base, path)


def vary(base: Experiment, row: RowConfig) -> Experiment:
    """The experiment with a row's values in place.

    Raises:
        ValueError: an unknown key, or a value that does not fit; says which row.
    """
    tree = to_dict(base)
    where = f"study.rows.{row.name}"
    for key, value in row.values.items():
        _put(tree, key.split("."), value, f"{where}.{key}")
    return _load(lambda file: load_experiment(["--config", file]), tree, where)


def study_yaml(study: StudyConfig, base: Experiment) -> str:
    """The whole file as `load_study` reads it, overrides included."""
    section = to_dict(study)
    section["rows"] = {row["name"]: row["values"] for row in section["rows"]}
    return yaml.safe_dump({"study": section, **to_dict(base)}, sort_keys=False, allow_unicode=True)


def check_names(given: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raise ValueError at the first name that is not known, with the nearest that is."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise ValueError(f"{where}: unknown {name!r}; {hint}")


def _check_row(row: RowConfig, stages: str) -> None:
    if not FOLDER_NAME.fullmatch(row.name):
        raise ValueError(f"study.rows: {row.name!r} cannot name a folder: use letters, digits, and any of . + - _")
    if stages == "generator" and row.name == SHARED:
        raise ValueError(f"study.rows: {SHARED!r} is the folder of the tokenizer that all rows share: rename the row")
    for key in row.values:
        if key.split(".")[0] == "run" or key.endswith("train.steps"):
            chosen = "name, folder, seed and steps of its runs are chosen by the study"
            raise ValueError(f"study.rows.{row.name}.{key}: a row cannot set this key; {chosen}")
        if stages == "generator" and key.split(".")[0] == "tokenizer":
            told = "study.stages=generator takes one tokenizer for all rows; set it to all"
            raise ValueError(f"study.rows.{row.name}.{key}: a row cannot set this key; {told}")
        if stages == "generator" and key.split(".")[0] == "data" and key not in ("data.crop", "data.flip"):
            told = "study.stages=generator encodes one set of images for all rows; set it to all"
            raise ValueError(f"study.rows.{row.name}.{key}: a row cannot set this key; {told}")
        if stages == "tokenizer" and key.split(".")[0] in ("autoregressive", "diffusion"):
            raise ValueError(f"study.rows.{row.name}.{key} changes nothing: study.stages=tokenizer; set it to all")


def _sorted_words(arguments: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """The files, words about the study, words about the experiment."""
    files: list[str] = []
    found: dict[bool, list[str]] = {True: [], False: []}
    words = iter(arguments)
    for word in words:
        key, equals, value = word.partition("=")
        if key == "--config":
            files.append(value if equals else next(words, ""))
            continue
        kind = key.startswith("--study.")
        found[kind].append(word)
        if kind and not equals:
            found[kind].append(next(words, ""))
    return files, found[True], found[False]


def _listed(section: dict[str, Any], path: str) -> dict[str, Any]:
    """The study section with its rows as a list, so that their keys are not taken for those of the study."""
    rows = section.get("rows") or {}
    if not isinstance(rows, dict) or not all(isinstance(values or {}, dict) for values in rows.values()):
        raise ValueError(f"study.rows in {path}: expected names of rows, each with a mapping of dotted keys to values")
    for name, schema in (("metrics", MetricConfig), ("groups", GroupConfig)):
        known = [each.name for each in dataclasses.fields(schema)]
        for entry in section.get(name) or []:
            check_names(entry if isinstance(entry, dict) else [], known, f"study.{name} in {path}")
    return {**section, "rows": [{"name": str(name), "values": values or {}} for name, values in rows.items()]}


def _load(load: Any, tree: dict[str, Any], origin: str) -> Any:
    """What `load` makes of a file that holds the tree; its complaints name the tree's origin."""
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "draft.yaml"
        draft.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
        try:
            return load(str(draft))
        except ValueError as error:
            told = str(error).replace(f"--config {draft}", origin).replace(str(draft), origin)
            raise ValueError(told if origin in told else f"{origin}: {told}") from error


def _put(tree: dict[str, Any], path: list[str], value: Any, where: str) -> None:
    """Set the value at a path of a nested mapping; a mapping is merged into one that is there."""
    *parents, last = path
    for name in parents:
        below = tree.get(name)
        if below is None:
            below = tree[name] = {}
        if not isinstance(below, dict):
            raise ValueError(f"{where}: {name!r} is a value, not a section")
        tree = below
    present = tree.get(last)
    if isinstance(value, dict) and isinstance(present, dict):
        for name, inner in value.items():
            _put(present, [str(name)], inner, where)
    else:
        tree[last] = value
