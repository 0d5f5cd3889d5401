"""The door for images that were not made here: a folder, archive or array of images against a reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoint import load_model, write_json
from engine.config import DataConfig, RunConfig, read_yaml
from engine.device import Device
from engine.sources import open_images
from eval.classifier import load_classifier
from eval.config import EvalConfig
from eval.features import open_features
from eval.image_files import open_pictures
from eval.judge import class_accuracy, sample_scores
from eval.neighbours import Archive, score_neighbours
from eval.panel import Panel, cache_of
from eval.pictures import Pictures, draw_indices, label_scheme
from eval.protocol import Record
from eval.reference_files import save_reference
from eval.standard import Standard, see_standard, standard_of, stated_standard, training_pictures
from eval.table import table

FAMILIES = ("autoregressive", "diffusion")


@dataclass(frozen=True, kw_only=True)
class OutsideConfig:
    """The sections that `tokenloom eval --generated` takes; features are Inception's unless others are named."""

    run: RunConfig = field(default_factory=RunConfig)
    eval: EvalConfig = field(default_factory=lambda: EvalConfig(features=("inception",)))


def judge_files(
    generated: str | Path | None,
    reference: str | Path,
    *,
    config: OutsideConfig,
    device: Device,
    size: int | None = None,
    num: int = 0,
    out: Path | None = None,
    statistics: Path | None = None,
) -> list[Record]:
    """Score images against a reference, print the table, write the records to `out`, and return them.

    Every process of a run must call it; all but the first get an empty list.

    Args:
        generated: a run of ours (its samples), or what `open_pictures` reads; None only writes `statistics`.
        reference: a run of ours (its training images), or what `open_reference` reads.
        size: centre-crop all images to so many pixels; without it they must all have one size.
        num: score so many of the images, drawn at random; 0 takes all.
        statistics: also write mean and covariance of the reference to this .npz.

    Raises:
        ValueError: nothing to read there, sizes that differ, missing weights, or too few images.
    """
    extractors, cache = _extractors(config.eval, device), cache_of(config.run, config.eval)
    panel = Panel(extractors=extractors, config=config.eval, cache=cache, device=device)
    subjects = {} if generated is None else _subjects(Path(generated), size, num)
    standard = _standard(Path(reference), size, panel, subjects)
    if statistics is not None and device.is_main:
        _save_statistics(statistics, standard, panel)
    records: list[Record] = []
    for subject, pictures in subjects.items():
        records += _score(subject, pictures, standard, panel, out=out)
    if subjects and device.is_main:
        records += _floor(standard, min(each.count for each in subjects.values()), panel)
    if records and device.is_main:
        print(table(records))
        if out is not None:
            write_json(out, records)
    device.barrier()
    return records


def _extractors(config: EvalConfig, device: Device) -> list[Any]:
    network = None
    if "classifier" in config.features:
        if config.classifier.path is None:
            raise ValueError(
                "eval.features has 'classifier': name a trained one, --eval.classifier.path=RUN/eval/classifier, or use"
                " other features"
            )
        folder = Path(config.classifier.path)
        network, _ = load_classifier(folder, num_classes=load_model(folder)[0].get("num_classes", 0), device=device)
    opened = [
        open_features(spec, inception_weights=config.inception_weights, classifier=network) for spec in config.features
    ]
    return [extractor.to(device.device) for extractor in opened]


def _subjects(path: Path, size: int | None, num: int) -> dict[str, Pictures]:
    """The sets to score by the names that their scores bear."""
    if not (path / "config.yaml").is_file():
        return {path.name.split(".")[0] or str(path): _some(open_pictures(path, size=size), num)}
    folders = {family: path / "samples" / family for family in FAMILIES}
    found = {family: folder for family, folder in folders.items() if (folder / "samples.json").is_file()}
    if not found:
        raise ValueError(f"{path}: the run has no samples yet; `tokenloom eval --config {path}/config.yaml` draws them")
    return {family: _some(open_pictures(folder, size=size), num) for family, folder in found.items()}


def _some(pictures: Pictures, num: int) -> Pictures:
    """So many of the images at random, or all."""
    if num > pictures.count:
        raise ValueError(f"--num {num}: {pictures.name} has {pictures.count} images")
    if not num or num == pictures.count:
        return pictures
    rows = draw_indices(np.arange(pictures.count), num, seed=0)
    return replace(pictures.at(rows), facts={**pictures.facts, "drawn": num, "draw_seed": 0})


def _standard(path: Path, size: int | None, panel: Panel, subjects: Mapping[str, Pictures]) -> Standard:
    if not (path / "config.yaml").is_file():
        standard = stated_standard(path, size, panel)
    else:
        told = read_yaml(str(path / "config.yaml"))["data"]
        data = DataConfig(**(told if size is None else {**told, "size": size}))
        standard = see_standard(training_pictures(open_images(data, "train")), panel)
    for pictures in subjects.values():
        if standard.pictures is not None:
            _check_alike(pictures, standard.pictures)
    return standard


def _check_alike(pictures: Pictures, others: Pictures) -> None:
    """Raise ValueError if two sets differ in size: to score crops against uncropped images is a usual mistake."""
    mine, theirs = (tuple(each.load(0, 1).shape[2:]) for each in (pictures, others))
    if mine != theirs:
        sizes = " and ".join(f"{width} x {height}" for height, width in (mine, theirs))
        raise ValueError(
            f"{pictures.name} and {others.name} have images of {sizes} pixels: score them at one size, --size"
            f" {min(*mine, *theirs)} for instance, which crops and shrinks both"
        )


def _facts(pictures: Pictures) -> dict[str, Any]:
    """What the protocol says of images that come from files."""
    height, width = pictures.load(0, 1).shape[2:]
    facts = dict(pictures.facts)
    crop, ours = facts.pop("crop", "as stored"), facts.pop("samples", None)
    subject = {"rounding": "as stored" if ours is None else "halves round up", **facts, **(ours or {})}
    size = height if height == width else [height, width]
    return {"size": size, "crop": crop, "labels": label_scheme(pictures.labels), "subject": subject}


def _score(subject: str, pictures: Pictures, standard: Standard, panel: Panel, *, out: Path | None) -> list[Record]:
    made = panel.see(replace(pictures, name=subject))
    if not panel.device.is_main:
        return []
    facts, main = _facts(pictures), panel.main
    records = sample_scores(subject, made, standard, panel.extractors, config=panel.config, main=main.name, facts=facts)
    judge = next((each for each in panel.extractors if each.name == "classifier"), None)
    if judge is not None and facts["labels"] is not None and pictures.labels is not None:
        records.append(class_accuracy(subject, made, pictures.labels, judge, facts=facts))
    if panel.config.neighbours and out is not None and standard.pictures is not None and standard.seen is not None:
        seen = standard.seen
        archive = Archive(standard.pictures, seen.outputs[main.name], None, [seen.pixels])
        records += score_neighbours(
            subject, pictures, made.outputs[main.name], archive, main, rows=panel.config.neighbours, facts=facts,
            sheet=out.with_name(f"{out.stem}-neighbours-{subject}.png"),
        )  # fmt: skip
    return records


def _floor(standard: Standard, num: int, panel: Panel) -> list[Record]:
    """What `num` of the real images score against the others, if these are no fewer."""
    real, seen = standard.pictures, standard.seen
    if real is None or seen is None or seen.count < 2 * num:
        print(f"scores of real images left out: they take {2 * num} images as a reference")
        return []
    order = draw_indices(np.arange(seen.count), 0, seed=0).tolist()
    control, others = seen.at(order[:num]), standard_of(seen.at(order[num:]), panel)
    facts = {key: value for key, value in _facts(real).items() if key != "labels"}
    how: dict[str, Any] = {"config": panel.config, "main": panel.main.name, "facts": facts}
    return sample_scores("real", control, others, panel.extractors, **how)


def _save_statistics(path: Path, standard: Standard, panel: Panel) -> None:
    """One file for each network."""
    for extractor in panel.extractors:
        if standard.seen is None:
            raise ValueError("--statistics needs a reference of images: the one given is statistics already")
        file = path if len(panel.extractors) == 1 else path.with_name(f"{path.stem}-{extractor.name}{path.suffix}")
        pixels = standard.seen.pixels
        save_reference(file, standard.gaussians[extractor.name], features=extractor.identity(), pixels=pixels)
        print(f"statistics of {standard.seen.count} images: {file}")
