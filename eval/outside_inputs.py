"""What images of any maker are judged, and against what; what cannot end well is refused before hours of work."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine.config import DataConfig, changed, read_yaml
from engine.sources import open_images
from eval.config import EvalConfig
from eval.features import Extractor
from eval.image_files import open_pictures
from eval.pictures import Pictures, draw_indices
from eval.reference_files import Reference, open_reference
from eval.standard import check_usable, training_pictures

FAMILIES = ("autoregressive", "diffusion")
REAL = "real"  # the subject of real images, held against others
SUFFIXES = (".zip", ".npz", ".npy", ".parquet")


def subject_of(path: Path) -> str:
    """What the scores of the images at a path are called: the last part of it, without the suffix of a file."""
    whole = path.resolve()  # also of "." and ".."
    name = whole.stem if whole.suffix.lower() in SUFFIXES and not whole.is_dir() else whole.name
    name = re.sub(r"[^\w.+@-]+", "-", name).strip("-")
    return name if name not in ("", REAL) else "generated"


def open_subjects(path: Path, size: int | None, num: int) -> dict[str, Pictures]:
    """The sets to score by the names that their scores bear."""
    if not (path / "config.yaml").is_file():
        return {subject_of(path): _some(open_pictures(path, size=size), num)}
    folders = {family: path / "samples" / family for family in FAMILIES}
    found = {family: folder for family, folder in folders.items() if (folder / "samples.json").is_file()}
    if not found:
        raise ValueError(
            f"{path}: a run, by its config.yaml, that has no samples yet: `tokenloom eval --config {path}/config.yaml`"
            " draws them. If it is none, move that file away"
        )
    return {family: _some(open_pictures(folder, size=size), num) for family, folder in found.items()}


def open_against(path: Path, size: int | None) -> Reference:
    """What images are held against; of a run its training images."""
    file = path / "config.yaml"
    if not file.is_file():
        return open_reference(path, size=size)
    told = read_yaml(str(file)).get("data")
    if not isinstance(told, dict):
        raise ValueError(f"{file}: no section data, which names training images; give a run, or move that file away")
    data = changed(DataConfig(), told if size is None else {**told, "size": size}, str(file))
    return Reference(
        pictures=training_pictures(open_images(data, "train")), gaussian=None, identity={"file": str(path)}
    )


def check_places(config: EvalConfig, out: Path | None, statistics: Path | None, *, judged: bool) -> None:
    """Raise ValueError if results could not be written after hours of work."""
    if config.neighbours and judged and out is None:
        raise ValueError(f"eval.neighbours={config.neighbours} draws a sheet beside the scores: name their file, `out`")
    for path, suffix in ((out, ".json"), (statistics, ".npz")):
        if path is None:
            continue
        if path.suffix != suffix or path.is_dir():
            raise ValueError(f"{path}: name a file that ends in {suffix}")
        there = next(folder for folder in path.absolute().parents if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(f"{path}: {there} is no folder that can be written to; name another place")


def check_inputs(
    subjects: Mapping[str, Pictures],
    reference: Reference,
    config: EvalConfig,
    extractors: Sequence[Extractor],
    statistics: Path | None,
) -> None:
    """Raise ValueError before hours of work if they could not end well."""
    real = reference.pictures
    if real is None and statistics is not None:
        raise ValueError(f"--statistics {statistics}: the reference has no images to measure, it is statistics already")
    if not subjects:
        return
    check_usable(reference, config, extractors)
    least = config.least_images if real is not None else 20
    for pictures in subjects.values():
        if pictures.count < least:
            told = f"{pictures.name}: {pictures.count} images are too few"
            raise ValueError(f"{told}: with eval.convention={config.convention} it takes {least}")
        if real is not None:
            _check_alike(pictures, real)


def _some(pictures: Pictures, num: int) -> Pictures:
    """So many of the images at random, or all."""
    if not 0 <= num <= pictures.count:
        raise ValueError(f"--num {num}: {pictures.name} has {pictures.count} images; 0 takes all")
    if not num or num == pictures.count:
        return pictures
    rows = draw_indices(np.arange(pictures.count), num, seed=0)
    return replace(pictures.at(rows), facts={**pictures.facts, "drawn": num, "draw_seed": 0})


def _check_alike(pictures: Pictures, others: Pictures) -> None:
    """Raise ValueError if two sets differ in size: to score crops against uncropped images is a usual mistake."""
    mine, theirs = (tuple(each.load(0, 1).shape[2:]) for each in (pictures, others))
    if mine != theirs:
        sizes = " and ".join(f"{width} x {height}" for height, width in (mine, theirs))
        raise ValueError(
            f"{pictures.name} and {others.name} have images of {sizes} pixels: score them at one size, --size"
            f" {min(*mine, *theirs)} for instance, which crops and shrinks both"
        )
