"""Promise: every YAML parses strictly and builds on the meta device; every enumerated choice is known to the code."""

import dataclasses
import functools
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from engine.config import TrainConfig, section_type, to_dict, to_yaml
from engine.sources import SOURCES
from eval.variants import samplings
from generator.autoregressive import build_network
from generator.clusters import DIVISIONS
from generator.consistency import build_objective
from generator.curriculum import PLACES, Curriculum
from generator.diffusion import build_denoiser
from generator.discretisation import COUNTS
from generator.learned_schedule import LearnedSchedule
from generator.objective import TARGETS, WEIGHTS
from generator.path import PATHS
from generator.schedule import SCHEDULES, build_schedule
from generator.solvers import CONSISTENCY_SOLVERS, ODE_SOLVERS, SDE_SOLVERS
from generator.steps import STEPS
from tokenizer.model import Tokenizer
from tokenizer.quantize import GRADIENTS
from tokenloom.experiment import Experiment, load_experiment
from tokenloom.study_config import StudyConfig, load_study, vary

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
SMOKE = Path(__file__).parent.parent / "configs" / "smoke.yaml"


def rows() -> list[typing.Any]:
    """Every YAML; of a study, with each of its rows."""
    found = []
    for path in CONFIGS:
        names = list(yaml.safe_load(path.read_text()).get("study", {}).get("rows", [])) or [None]
        found += [pytest.param(path, name, id=f"{path.stem}, {name}" if name else path.stem) for name in names]
    return found


@functools.cache
def study_of(path: Path) -> tuple[StudyConfig, Experiment]:
    return load_study(["--config", str(path)])


def experiment_of(path: Path, row: str | None) -> Experiment:
    if row is None:
        return load_experiment(["--config", str(path)])
    study, base = study_of(path)
    return vary(base, study.rows[study.names.index(row)])


@pytest.mark.parametrize(("path", "row"), rows())
def test_every_yaml_parses_and_builds(path: Path, row: str | None) -> None:
    experiment = experiment_of(path, row)
    with torch.device("meta"):
        tokenizer = Tokenizer(experiment.tokenizer.model, image_size=experiment.data.size)
        card = {
            "grid": tokenizer.grid, "vocab_size": tokenizer.vocab_size, "latent_shape": tokenizer.latent_shape,
            "num_classes": 10,
        }  # fmt: skip
        if experiment.autoregressive is not None:
            build_network(experiment.autoregressive.model, card)
        if experiment.diffusion is not None:
            told = to_dict(experiment.diffusion)
            build_denoiser(experiment.diffusion.model, {**card, "config": told})
            build_objective(to_dict(experiment.diffusion))
    if experiment.diffusion is not None:
        schedule, train = build_schedule(experiment.diffusion.schedule), experiment.diffusion.train
        Curriculum(experiment.diffusion.curriculum, schedule, steps=train.steps)
    assert len(samplings(experiment.eval, dict(experiment.generators()))) >= len(experiment.eval.variants)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_a_run_keeps_of_every_yaml_reads_back(path: Path, tmp_path: Path) -> None:
    """Of a study, its last row, which differs from the base."""
    rows = list(yaml.safe_load(path.read_text()).get("study", {}).get("rows", [])) or [None]
    experiment = experiment_of(path, rows[-1])
    again = tmp_path / "resolved.yaml"
    again.write_text(to_yaml(experiment))
    assert load_experiment(["--config", str(again)]) == experiment


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_yaml_begins_with_its_purpose_and_command(path: Path) -> None:
    header = re.split(r"^\w", path.read_text(), maxsplit=1, flags=re.MULTILINE)[0]
    assert header.startswith("# ") and f"--config configs/{path.name}" in header


def choices(schema: type, prefix: str = "") -> Iterator[tuple[str, tuple]]:
    """Every key with enumerated values, and these."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        section = section_type(hint)
        if section is not None:
            yield from choices(section, f"{key}.")
        for option in (hint, *typing.get_args(hint)):
            if typing.get_origin(option) is typing.Literal:
                yield key, typing.get_args(option)


# Where the code keeps what a choice means. Keys that are not here are read by an if, and tested in their room.
TABLES = {
    "data.source": SOURCES,
    "tokenizer.quantizer.gradient": GRADIENTS,
    "diffusion.path": PATHS,
    "diffusion.schedule.kind": {**SCHEDULES, "learned": LearnedSchedule},
    "diffusion.schedule.mixed.kind": SCHEDULES,
    "diffusion.curriculum.kind": PLACES,
    "diffusion.curriculum.clusters": DIVISIONS,
    "diffusion.target": TARGETS,
    "diffusion.weight": WEIGHTS,
    "diffusion.objective.discretisation": COUNTS,
    "diffusion.sample.solver": {**ODE_SOLVERS, **SDE_SOLVERS, **CONSISTENCY_SOLVERS},
    "diffusion.sample.steps": STEPS,
}


@pytest.mark.parametrize(("key", "table"), list(TABLES.items()), ids=list(TABLES))
def test_every_choice_is_in_its_table_and_nothing_else_is(key: str, table: dict) -> None:
    assert set(dict(choices(Experiment))[key]) == set(table)


CONSISTENCY = ["diffusion.objective.kind=consistency", "diffusion.sample.solver=consistency"]
FAMILIES = ("autoregressive", "diffusion")
LEVEL_MAPS = ["diffusion.schedule.kind=learned", "diffusion.sample.steps=time"]
# What a choice needs beside it; a dot in front stands for its own section.
COMPANIONS = {
    **dict.fromkeys(("consistency", "polynomial", "sinusoidal", "element"), CONSISTENCY),
    "diffusion.objective.discretisation=constant": CONSISTENCY,
    "diffusion.schedule.learned.per=channel": LEVEL_MAPS,
    "diffusion.schedule.learned.per=pixel": [*LEVEL_MAPS, "diffusion.condition.kind=image"],
    **{f"{key}.condition.text.captions=data": [f"{key}.condition.kind=text"] for key in FAMILIES},
    **{
        f"{key}.condition.text.encoder={each}": [".path=folder", f"{key}.condition.kind=text"]
        for key in FAMILIES
        for each in ("clip", "t5")
    },
    "exponential": [".final_learning_rate=1e-6"],
    "fsq": [".levels=[4,4]", "tokenizer.model.code_dim=2"],
    "easy_to_hard": [".num_clusters=3", ".patience=3"],
    "anti": [".num_clusters=3", ".patience=3"],
    "fixed": [".kind=easy_to_hard", ".num_clusters=3", ".stage_steps=5"],
    "list": [".levels=[-6,0,6]"],
    "torch_fidelity": [".num_samples=1000"],
    "pixels": [  # which have no networks to set and nothing to train
        *(".vocab_size=8192", ".code_dim=32", ".encoder=null", ".decoder=null"),
        f"tokenizer.train={json.dumps(to_dict(TrainConfig()))}",
    ],
}


CHOICES = dict(choices(Experiment))
# Refused beside some choice of another key.
APART = (
    *("consistency", "polynomial", "sinusoidal", "element", "diffusion.objective.discretisation=constant"),
    *("diffusion.schedule.learned.per=channel", "diffusion.schedule.learned.per=pixel"),
    *("clip", "t5", "data", "image", "kl", "pixels", "fixed"),
)


def accepted(chosen: dict[str, str]) -> None:
    """Give the smoke test's run these values, with what they need beside them, and find them there."""
    words = [f"--{key}={value}" for key, value in chosen.items()]
    for key, value in chosen.items():
        section = key.rpartition(".")[0]
        beside = [*COMPANIONS.get(value, ()), *COMPANIONS.get(f"{key}={value}", ())]
        words += [f"--{section if more[0] == '.' else ''}{more}" for more in beside]
    experiment = load_experiment(["--config", str(SMOKE), *words])
    for key, value in chosen.items():
        assert functools.reduce(getattr, key.split("."), experiment) == value, key


@pytest.mark.parametrize("turn", range(max(map(len, CHOICES.values()))))
def test_every_choice_can_be_given_on_the_command_line(turn: int) -> None:
    """The first choices of all keys together, then the second ones, and so on."""
    turns = {key: values[turn] for key, values in CHOICES.items() if turn < len(values)}
    accepted({key: value for key, value in turns.items() if not {value, f"{key}={value}"} & {*APART}})


@pytest.mark.parametrize("value", APART)
def test_a_choice_that_stands_apart_can_be_given_too(value: str) -> None:
    for key, values in CHOICES.items():
        for each in values:
            if value in (each, f"{key}={each}"):
                accepted({key: each})
