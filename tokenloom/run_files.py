"""What lies in a run folder, for those who only look: a missing or cut file counts as not there yet, never an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import yaml

from engine.log import read_metrics
from engine.shards import Shards, open_shards
from eval.protocol import Record, read_scores

FAMILIES = ("autoregressive", "diffusion")
STAGES = ("tokenizer", *FAMILIES)
State = Literal["done", "training", "planned", "absent"]


class RunFiles:
    """The files of one run, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.resolve().name
        self.config = _read_yaml(folder / "config.yaml")

    def card(self, stage: str) -> dict[str, Any]:
        """model.json of a finished stage; empty before that."""
        return self._object(f"{stage}/model.json")

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """Lines of a stage's metrics.jsonl."""
        try:
            return [line for line in read_metrics(self.folder / stage) if isinstance(line, dict) and "step" in line]
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
        lines = self.metrics(stage)
        section = self.config.get(stage) or self._object(f"{stage}/identity.json").get(stage) or {}
        return (lines[-1]["step"] if lines else 0), section.get("train", {}).get("steps")

    def codes(self, split: str) -> Shards | None:
        """Codes and latents of a split, if they are complete."""
        try:
            return open_shards(self.folder / "codes" / split)
        except (ValueError, KeyError, TypeError, OSError):
            return None

    def images(self, split: str) -> dict[str, Any]:
        """Identity of a split's images: source, path, size, n; from the codes, else from the tokenizer's training."""
        told = self._object(f"codes/{split}/meta.json").get("images")
        if not told and split == "train":
            told = self._object("tokenizer/identity.json").get("data") or self.config.get("data")
        return told or {}

    def samples(self, family: str) -> dict[str, Any]:
        """samples.json of a family; empty if nothing is drawn yet."""
        told = self._object(f"samples/{family}/samples.json")
        return told if {"labels", "seeds"} <= told.keys() else {}

    def previews(self, stage: str, name: str) -> list[tuple[int, Path]]:
        """Preview grids of a stage under one name, such as samples, with their steps, oldest first."""
        paths = sorted((self.folder / stage / "previews").glob(f"step-*-{name}.png"))
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
        return self._object("eval/probe.json").get("curve") or []

    def stages(self) -> dict[str, dict[str, Any]]:
        """stages.json: seconds, processes and precision of each finished stage."""
        return {name: told for name, told in self._object("stages.json").items() if isinstance(told, dict)}

    def image_size(self) -> int:
        """Height and width in pixels; 0 if no file tells."""
        card = self.card("tokenizer").get("config", {})
        return int(card.get("image_size") or self.images("train").get("size") or 0)

    def _object(self, path: str) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
