"""A folder of samples: 000000.png ..., grid.png, and samples.json, which says what they are; never half there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.checkpoint import write_json
from engine.config import to_dict
from engine.log import save_grid
from generator.config import AutoregressiveSampleConfig, DiffusionSampleConfig

SPEED = ("batch_size", "compile")  # settings that decide no image, as long as numbers are not rounded to bf16
KINDS = {"family": str, "generator": str, "tokenizer": str, "settings": dict, "labels": list, "seeds": list}
GRID_CLASSES, GRID_COLUMNS = 10, 8
ROWS = ("labels", "seeds", "prompts", "images")  # what samples.json tells of each sample; the last two of some
Told = dict[str, Any]  # samples.json


def read_samples(folder: Path) -> Told | None:
    """The samples.json of a folder; None if there is none, or it is cut or foreign."""
    return _read(folder / "samples.json")


def begins_with(told: Told | None, request: Told) -> bool:
    """Whether a folder that `told` describes begins with the samples that are requested."""
    if told is None or "acceptance" in told or told["family"] != request["family"]:
        return False
    rows = rows_of(told)[: len(request["seeds"])] == rows_of(request)
    models = all(told.get(key) == request.get(key) for key in ("generator", "tokenizer", "guide", "outside"))
    return rows and models and full_settings(told) == full_settings(request)


def is_answered(told: Told | None, request: Told, *, more: bool = False) -> bool:
    """Whether a folder that `told` describes holds just the samples that are requested, or these and `more`."""
    return told is not None and begins_with(told, request) and (more or len(told["seeds"]) == len(request["seeds"]))


def rows_of(told: Told) -> list[tuple[Any, ...]]:
    """What is told of each sample."""
    return list(zip(*(told[key] for key in ROWS if key in told), strict=True))


def without_rows(told: Told) -> Told:
    """What is told of all samples alike, as of none."""
    return {**told, **{key: [] for key in ROWS if key in told}}


def full_settings(told: Told) -> dict[str, Any]:
    """The settings that decide samples; one that is younger than they had its default, which changes nothing."""
    kind = AutoregressiveSampleConfig if told["family"] == "autoregressive" else DiffusionSampleConfig
    return deciding({**to_dict(kind()), **told["settings"]})


def deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide images. In bf16 all of them do: other batches round otherwise, and so does compilation,
    which makes many images others."""
    if settings.get("precision") == "bf16":
        return settings
    return {key: value for key, value in settings.items() if key not in SPEED}


def begin(draft: Path, request: Told, known: Sequence[Path] = ()) -> None:
    """A draft folder for this request; what an interrupted call left of the same request stays.

    Pictures of the folders `known` that fit the request, row by row, are taken over.
    """
    if _read(draft / "request.json") == request:
        return
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for folder in known:
        for row in _in_common(read_samples(folder), request):
            if png_path(folder, row).is_file():
                shutil.copyfile(png_path(folder, row), png_path(draft, row))
    write_json(draft / "request.json", request)


def check_replaceable(folder: Path) -> None:
    """Raise ValueError if there are files that are no samples, which `publish` must not replace."""
    if folder.exists() and read_samples(folder) is None and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files but no samples.json of ours: choose another folder, or empty it")


def publish(draft: Path, folder: Path, told: Told) -> None:
    """Add grid and samples.json to a draft with all its pictures, then put it in the place of older samples."""
    shown, columns = grid_rows(told["labels"])
    images = np.stack([np.asarray(Image.open(png_path(draft, row))) for row in shown])  # [n, H, W, 3]
    save_grid(torch.from_numpy(images).permute(0, 3, 1, 2), draft / "grid.png", columns=columns)
    write_json(draft / "samples.json", told)
    old = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    (folder / "request.json").unlink(missing_ok=True)


def draft_of(folder: Path) -> Path:
    """Where samples wait until they are complete."""
    return folder.with_name(f".draft-{folder.name}")


def grid_rows(labels: Sequence[int]) -> tuple[list[int], int]:
    """Which samples a grid shows, and in how many columns: one row for each of the first classes."""
    classes = sorted(set(labels))[:GRID_CLASSES]
    members = [[row for row, label in enumerate(labels) if label == each] for each in classes]
    if len(members) == 1:
        return members[0][: GRID_COLUMNS**2], min(GRID_COLUMNS, len(members[0]))
    columns = min(GRID_COLUMNS, *(len(rows) for rows in members))
    return [row for rows in members for row in rows[:columns]], columns


def png_path(folder: Path, row: int) -> Path:
    """Sample number `row`, from 0."""
    return folder / f"{row:06d}.png"


def write_png(path: Path, image: Tensor) -> None:
    """Write uint8 [3, H, W]; a killed process leaves no half file under the final name."""
    draft = path.with_suffix(".part")
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(draft, format="PNG")
    draft.replace(path)


def _in_common(told: Told | None, request: Told) -> list[int]:
    """The rows in which a folder has the condition and seed that are requested, of the same models and settings."""
    if told is None or not begins_with(told, without_rows(request)):
        return []
    pairs = zip(rows_of(told), rows_of(request), strict=False)
    return [row for row, (mine, wish) in enumerate(pairs) if mine == wish]


def _read(path: Path) -> Told | None:
    """What a file tells of samples; None if there is none, it is cut, or it tells of something else."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(told, dict) and all(isinstance(told.get(key), kind) for key, kind in KINDS.items())
    return told if ours else None
