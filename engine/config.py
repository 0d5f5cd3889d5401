"""Configuration: frozen dataclasses filled from YAML files and dotted overrides; an unknown key never passes.

Imports no torch, so that `--help` answers at once. Each room keeps the dataclasses of its own section.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

Schema = TypeVar("Schema")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    name: str = "trial"
    """Folder of the run inside root."""
    root: str = "runs"
    """Folder that holds all runs."""
    seed: int = 0
    """Seeds weights, data order, augmentation and noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes the GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products in training; auto means bf16 where the hardware has it."""
    threads: int = 0
    """CPU threads per process; 0 means as many as the CPU quota allows."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share a model: a copy each (DDP) or a shard each (FSDP2)."""
    compile: bool = False
    """Compile the networks with torch.compile before training."""
    tensorboard: bool = False
    """Also write TensorBoard event files (extra: track)."""
    tokenizer: str | None = None
    """Run whose tokenizer and codes this run takes, instead of making its own."""

    def __post_init__(self) -> None:
        for key in ("seed", "threads"):
            if getattr(self, key) < 0:
                raise ValueError(f"run.{key}={getattr(self, key)} must not be negative")

    @property
    def folder(self) -> Path:
        """Where everything of this run lies."""
        return Path(self.root) / self.name

    @property
    def tokenizer_folder(self) -> Path:
        """The run that holds the tokenizer and its codes: another one if `tokenizer` names it."""
        return self.folder if self.tokenizer is None else Path(self.tokenizer)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    source: Literal["digits", "folder", "parquet", "torchvision", "hf", "webdataset"] = "digits"
    """Where images come from."""
    path: str | None = None
    """Training images: a folder, a parquet file or glob, a torchvision root, a tar pattern, a data set of the hub."""
    test_path: str | None = None
    """Held-out images, as path; if absent, the source's own test split, else test_fraction is split off."""
    name: str | None = None
    """Class in torchvision.datasets, or configuration name of a hub data set."""
    test_fraction: float = 0.1
    """Share of the images held out when the source has no test split of its own."""
    image_column: str | None = None
    """Column or key of the image; found by itself if absent."""
    label_column: str | None = None
    """Column or key of the label; found by itself if absent."""
    caption_column: str | None = None
    """Column or key of the caption; none if absent."""
    size: int = 32
    """Height and width in pixels after cropping."""
    crop: Literal["center", "random", "shift"] = "center"
    """Training crop: the centre, a random square of 80 to 100 % of the shorter side, or the centre moved by up to a
    sixteenth of the size with its edges repeated. Scores always use the centre."""
    flip: bool = False
    """Mirror half of the training images."""
    max_corrupt: int = 20
    """So many unreadable images are skipped with a warning; one more is an error."""
    workers: int = 2
    """Threads that read and decode ahead of the training step."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = 1000
    """Optimiser steps in all."""
    batch_size: int = 64
    """Samples per optimiser step, over all processes and accumulation parts together."""
    accumulate: int = 1
    """Parts into which each process cuts its share of a batch, to save memory."""
    optimizer: Literal["adamw", "radam"] = "adamw"
    """adamw, or radam, which does without a warm-up (Liu et al., 2020); both with decoupled decay."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    final_learning_rate: float = 0.0
    """Learning rate at the last step (cosine, linear, exponential decay)."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    decay: Literal["constant", "cosine", "linear", "exponential"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    decay_start: int = 0
    """Step at which the decay begins, if later than the warm-up's end."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; biases, norms and embeddings have none."""
    betas: tuple[float, float] = (0.9, 0.99)
    """The optimizer's betas."""
    clip_norm: float = 1.0
    """Largest gradient norm per network, a discriminator apart; 0 switches clipping off."""
    ema: float = 0.999
    """Decay of the averaged weights, warmed up over the first steps; 0 switches averaging off."""
    ema_widths: tuple[float, ...] = ()
    """Widths (sigma_rel) of further averages, power functions of the step, from whose snapshots averages of any width
    can be reconstructed after training; [0.05,0.1] in EDM2."""
    snapshot_every: int = 0
    """Steps between snapshots of the averaged weights, which are kept for good, the last step's too; 0 keeps none."""
    max_bad_steps: int = 5
    """Stop after so many steps in a row whose loss or gradient is not finite."""
    log_every: int = 50
    """Steps between lines of metrics."""
    preview_every: int = 500
    """Steps between validations and preview pictures; 0 switches them off."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    milestone_every: int = 0
    """Checkpoints at multiples of this step are kept for ever; 0 keeps none."""

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep_last", "max_bad_steps")
        for key in positive:
            if getattr(self, key) < 1:
                raise ValueError(f"train.{key}={getattr(self, key)} must be at least 1")
        for key in ("final_learning_rate", "warmup_steps", "decay_start", "weight_decay", "clip_norm", "preview_every",
                    "milestone_every", "snapshot_every"):  # fmt: skip
            if getattr(self, key) < 0:
                raise ValueError(f"train.{key}={getattr(self, key)} must not be negative")
        if not self.learning_rate > 0:
            raise ValueError(f"train.learning_rate={self.learning_rate} must be above 0")
        for key, values in (("ema", (self.ema,)), ("betas", self.betas)):
            if not all(0 <= value < 1 for value in values):
                raise ValueError(f"train.{key}={getattr(self, key)} must lie in [0, 1)")
        self._check_widths()
        if self.decay == "exponential" and self.final_learning_rate == 0:
            raise ValueError("train.final_learning_rate=0.0 must be above 0 for train.decay=exponential")

    def _check_widths(self) -> None:
        widths = list(self.ema_widths)
        if not all(0 < width < 0.28 for width in widths) or len({*widths}) < len(widths):
            raise ValueError(f"train.ema_widths={widths} must lie between 0 and 0.28 and differ")
        if widths and not self.snapshot_every:
            raise ValueError(f"train.ema_widths={widths} are of use in snapshots alone: set train.snapshot_every")


def load(schema: type[Schema], arguments: Sequence[str], *, program: str = "tokenloom") -> Schema:
    """Build a `schema` from `--config FILE` (repeatable, later files win) and `--dotted.key=value` overrides.

    Raises:
        ValueError: an unknown key (with the nearest known one), a value of the wrong type, a missing or broken file.
    """
    known = list(dotted_keys(schema))
    for key, origin in _given_keys(arguments, list(open_keys(schema))):
        _check_key(key, origin, known)
    return _filled(schema, lambda parser: parser.parse_args(list(arguments)), program)


def changed(config: Schema, values: dict[str, Any], where: str) -> Schema:
    """A configuration with dotted keys at other values, read as strictly as a file; `where` they stand is told.

    Raises:
        ValueError: an unknown key, or a value that does not fit.
    """
    tree, known = to_dict(config), list(dotted_keys(type(config)))
    for key, value in values.items():
        _check_key(key, where, known)
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            if place.get(section) is None:
                place[section] = {}
            place = place[section]
        place[last] = value
    try:
        return _filled(type(config), lambda parser: parser.parse_object(tree))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _filled(schema: type[Schema], parse: Callable[[Any], Any], program: str = "tokenloom") -> Schema:
    """The schema with what `parse` makes of its parser."""
    parser = _parser(schema, program)  # type: ignore[arg-type]
    try:
        filled = parser.instantiate(parse(parser))
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise ValueError(_innermost(str(error))) from error
    return schema(**{field.name: filled[field.name] for field in dataclasses.fields(schema)})  # type: ignore[arg-type]


@functools.cache
def _parser(schema: type, program: str) -> Any:
    """The parser of a schema; to build one takes about as long as to use it."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=program, exit_on_error=False, description=schema.__doc__)
    parser.add_argument("--config", action="config", help="YAML file; may be given several times, later ones win")
    parser.add_class_arguments(schema, None)
    return parser


def dotted_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Every key of a nested dataclass: sections and leaves, in order."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key = f"{prefix}{field.name}"
        yield key
        section = section_type(hints[field.name])
        if section is not None:
            yield from dotted_keys(section, f"{key}.")


def open_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Keys whose values are mappings with names of the user's own."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        section = section_type(hints[field.name])
        if section is not None:
            yield from open_keys(section, f"{prefix}{field.name}.")
        elif typing.get_origin(hints[field.name]) is dict:
            yield f"{prefix}{field.name}"


def section_type(hint: Any) -> type | None:
    """The dataclass inside `Section` or `Section | None`; None for a leaf."""
    options = typing.get_args(hint) or (hint,)
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain, JSON-ready values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: Any) -> str:
    """The configuration as YAML text that `load` reads back to an equal object."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def difference(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, each with its old and its new value."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    keys = sorted(before.keys() | after.keys())
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _given_keys(arguments: Sequence[str], mappings: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every dotted key that a user wrote, with where: the command line or a file. Those inside `mappings` are free."""
    for position, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        key, _, value = argument[2:].partition("=")
        if key == "config":
            path = value or (arguments[position + 1] if position + 1 < len(arguments) else "")
            inside = (inner for inner, _ in _flatten(read_yaml(path)))
            yield from ((inner, path) for inner in inside if not inner.startswith(tuple(f"{key}." for key in mappings)))
        elif key not in ("help", "print_config"):
            yield key, "the command line"


def parse_yaml(text: str) -> Any:
    """What plain YAML says, by libyaml where it is there: eight times as fast as PyYAML's own reader."""
    import yaml

    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def read_yaml(path: str) -> dict[str, Any]:
    """The sections of a configuration file.

    Raises:
        ValueError: a missing or broken file, or one without sections.
    """
    import yaml

    if not Path(path).is_file():
        raise ValueError(f"--config {path}: no such file (working folder: {Path.cwd()})")
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: expected sections such as `run:`, found {type(content).__name__}")
    return content


def _check_key(key: str, origin: str, known: list[str]) -> None:
    if key in known:
        return
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}?" if close else "`--print_config` lists every key"
    raise ValueError(f"unknown key {key!r} in {origin}: {hint}")


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _innermost(message: str) -> str:
    """jsonargparse nests its report of an optional section; keep the lines that say what was wrong."""
    noise = (
        *("Does not validate", "Subtypes:", "Errors:", "Given value"),
        *("- Expected a <class 'NoneType'>", "- Problem with given class_path"),
    )
    lines = [line.strip() for line in message.splitlines()]
    return " ".join(line.removeprefix("- ") for line in lines if line and not line.startswith(noise))
