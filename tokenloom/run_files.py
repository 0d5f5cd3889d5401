"""What lies in a run folder, for those who only look: a missing or cut file counts as not there yet, never an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import yaml

from engine.config import parse_yaml
from engine.log import read_metrics
from engine.shards import Shards, open_shards
from eval.protocol import Record, read_scores

FAMILIES = ("autoregressive", "diffusion")
STAGES = ("tokenizer", *FAMILIES)
State = Literal["done", "training", "planned", "absent"]


class RunFiles:
    """The files of one run, read when asked for; tokenizer and codes may be those of another run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.resolve().name
        self.config = _read_yaml(folder / "config.yaml")
        self.tokenizer_folder = tokenizer_folder(folder)

    def stage_folder(self, stage: str) -> Path:
        """Where a stage has left its files."""
        return (self.tokenizer_folder if stage in ("tokenizer", "codes") else self.folder) / stage

    def card(self, stage: str) -> dict[str, Any]:
        """model.json of a finished stage; empty before that."""
        return _read_object(self.stage_folder(stage) / "model.json")

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """Lines of a stage's metrics.jsonl."""
        try:
            lines = read_metrics(self.stage_folder(stage))
            return [line for line in lines if isinstance(line, dict) and "step" in line]
        except (OSError, UnicodeDecodeError):
            return []

    def state(self, stage: str) -> State:
        """How far a stage is: `absent` if the configuration does not have it, as far as the folder tells."""
        if self.card(stage):
            return "done"
        if self.metrics(stage):
            return "training"
        return "planned" if self.config.get(stage) else "absent"

    def progress(self, stage: str) -> tuple[int, int | None]:
        """Steps done, and steps in all if any file tells."""
        lines, home = self.metrics(stage), self.stage_folder(stage)
        own = self.config if home == self.folder / stage else {}  # another run's tokenizer has a section of its own
        section = own.get(stage) or _read_object(home / "identity.json").get(stage) or {}
        return (lines[-1]["step"] if lines else 0), section.get("train", {}).get("steps")

    def codes(self, split: str) -> Shards | None:
        """Codes and latents of a split, if they are complete."""
        try:
            return open_shards(self.stage_folder("codes") / split)
        except (ValueError, KeyError, TypeError, OSError):
            return None

    def images(self, split: str) -> dict[str, Any]:
        """Identity of a split's images: source, path, size, n; from the codes, else from the tokenizer's training."""
        told = _read_object(self.stage_folder("codes") / split / "meta.json").get("images")
        if not told and split == "train":
            begun = _read_object(self.stage_folder("tokenizer") / "identity.json")
            told = begun.get("data") or self.config.get("data")
        return told or {}

    def augmentation(self) -> dict[str, Any]:
        """How the views of the encoded training images were drawn; empty where there is the centre crop alone."""
        return _read_object(self.stage_folder("codes") / "train" / "meta.json").get("augmentation") or {}

    def samples(self, family: str) -> dict[str, Any]:
        """samples.json of a family; empty if nothing is drawn yet."""
        told = _read_object(self.folder / "samples" / family / "samples.json")
        return told if {"labels", "seeds"} <= told.keys() else {}

    def previews(self, stage: str, name: str) -> list[tuple[int, Path]]:
        """Preview grids of a stage under one name, such as samples, with their steps, oldest first."""
        paths = sorted((self.stage_folder(stage) / "previews").glob(f"step-*-{name}.png"))
        steps = (path.name.split("-")[1] for path in paths)
        return [(int(step), path) for step, path in zip(steps, paths, strict=True) if step.isdigit()]

    def scores(self) -> list[Record]:
        """Records of eval/metrics.json."""
        try:
            return read_scores(self.folder / "eval" / "metrics.json")
        except ValueError:
            return []

    def probe(self) -> list[dict[str, Any]]:
        """Rows of eval/probe.json: family, tap, test_top1, interval."""
        return _read_object(self.folder / "eval" / "probe.json").get("curve") or []

    def stages(self) -> dict[str, dict[str, Any]]:
        """stages.json: seconds, processes and precision of each finished stage."""
        found = _read_object(self.folder / "stages.json")
        return {name: told for name, told in found.items() if isinstance(told, dict)}

    def image_size(self) -> int:
        """Height and width in pixels; 0 if no file tells."""
        card = self.card("tokenizer").get("config", {})
        return int(card.get("image_size") or self.images("train").get("size") or 0)


def tokenizer_folder(folder: Path) -> Path:
    """The run that holds the tokenizer of the run in `folder`: its own, unless its configuration names another one.

    That name counts from where the run was started, which its own place tells, if it leads nowhere from here.
    """
    told = _read_yaml(folder / "config.yaml").get("run")
    run = told if isinstance(told, dict) else {}
    other = run.get("tokenizer")
    if (folder / "tokenizer").is_dir() or not isinstance(other, str):
        return folder
    own, here = Path(str(run.get("root", "")), str(run.get("name", ""))), folder.resolve()
    if Path(other).exists() or own.is_absolute() or not here.as_posix().endswith(f"/{own.as_posix()}"):
        return Path(other)
    return here.parents[len(own.parts) - 1] / other


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        found = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
