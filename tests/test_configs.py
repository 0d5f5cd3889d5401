"""Promise: every YAML parses strictly and builds on the meta device; every enumerated choice is known to the code."""

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.config import section_type, to_yaml
from engine.sources import SOURCES
from generator.autoregressive import build_network
from generator.diffusion import build_denoiser
from generator.objective import TARGETS, WEIGHTS
from generator.path import PATHS
from generator.schedule import SCHEDULES
from generator.solvers import ODE_SOLVERS, SDE_SOLVERS
from generator.steps import STEPS
from tokenizer.model import Tokenizer
from tokenizer.quantize import GRADIENTS
from tokenloom.experiment import Experiment, load_experiment

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_yaml_parses_and_builds(path: Path, tmp_path: Path) -> None:
    experiment = load_experiment(["--config", str(path)])
    with torch.device("meta"):
        tokenizer = Tokenizer(experiment.tokenizer.model, image_size=experiment.data.size)
        card = {
            "grid": tokenizer.grid, "vocab_size": tokenizer.vocab_size, "latent_shape": tokenizer.latent_shape,
            "num_classes": 10,
        }  # fmt: skip
        if experiment.autoregressive is not None:
            build_network(experiment.autoregressive.model, card)
        if experiment.diffusion is not None:
            build_denoiser(experiment.diffusion.model, card)
    again = tmp_path / "resolved.yaml"
    again.write_text(to_yaml(experiment))
    assert load_experiment(["--config", str(again)]) == experiment


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_yaml_begins_with_its_purpose_and_command(path: Path) -> None:
    header = path.read_text().split("run:")[0]
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
    "diffusion.schedule.kind": SCHEDULES,
    "diffusion.target": TARGETS,
    "diffusion.weight": WEIGHTS,
    "diffusion.sample.solver": {**ODE_SOLVERS, **SDE_SOLVERS},
    "diffusion.sample.steps": STEPS,
}


@pytest.mark.parametrize(("key", "table"), list(TABLES.items()), ids=list(TABLES))
def test_every_choice_is_in_its_table_and_nothing_else_is(key: str, table: dict) -> None:
    assert set(dict(choices(Experiment))[key]) == set(table)


@pytest.mark.parametrize(("key", "values"), [pytest.param(*choice, id=choice[0]) for choice in choices(Experiment)])
def test_every_choice_can_be_given_on_the_command_line(key: str, values: tuple) -> None:
    for value in values:
        words = [f"--{key}={value}"]
        if value == "exponential":
            words.append(f"--{key.removesuffix('decay')}final_learning_rate=1e-6")
        experiment: object = load_experiment(["--config", str(CONFIGS[-1]), *words])
        for part in key.split("."):
            experiment = getattr(experiment, part)
        assert experiment == value
