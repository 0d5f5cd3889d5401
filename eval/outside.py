"""The door for images that were not made here: a folder, archive or array of images against a reference."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoint import load_model, write_json
from engine.config import RunConfig
from engine.device import Device
from eval.classifier import Classifier, load_classifier
from eval.config import EvalConfig
from eval.features import ClassifierFeatures
from eval.judge import class_accuracy, sample_scores
from eval.neighbours import Archive, score_neighbours
from eval.outside_inputs import REAL, check_inputs, check_places, open_against, open_subjects
from eval.panel import Panel, cache_of, open_extractors
from eval.pictures import Pictures, draw_indices, label_scheme
from eval.protocol import Record
from eval.reference_files import save_reference
from eval.standard import Standard, gaussian, standard_of, stated_standard
from eval.table import table


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
        out: a .json; the sheet of nearest neighbours, if eval.neighbours asks for one, lies beside it.
        statistics: also write mean and covariance of the reference to this .npz.

    Raises:
        ValueError: nothing to read there, sizes that differ, missing weights, too few images, or no place to write to.
    """
    check_places(config.eval, out, statistics, judged=generated is not None)
    extractors = open_extractors(config.eval, device, lambda: _classifier(config.eval, device))
    panel = Panel(extractors=extractors, config=config.eval, cache=cache_of(config.run, config.eval), device=device)
    subjects = {} if generated is None else open_subjects(Path(generated), size, num)
    against = open_against(Path(reference), size)
    check_inputs(subjects, against, config.eval, extractors, statistics)
    standard = stated_standard(against, panel)
    if statistics is not None and device.is_main:
        _save_statistics(statistics, standard, panel)
    records: list[Record] = []
    for subject, pictures in subjects.items():
        records += _score(subject, pictures, standard, panel, out=out)
    if subjects and device.is_main:
        records += _floor(standard, min(each.count for each in subjects.values()), panel)
        print(table(records))
        if out is not None:
            write_json(out, records)
    device.barrier()
    return records


def _classifier(config: EvalConfig, device: Device) -> Classifier:
    if config.classifier.path is None:
        raise ValueError(
            "eval.features has 'classifier': name a trained one, --eval.classifier.path=RUN/eval/classifier, or use"
            " other features"
        )
    folder = Path(config.classifier.path)
    return load_classifier(folder, num_classes=load_model(folder)[0].get("num_classes", 0), device=device)[0]


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
    judge = next((each for each in panel.extractors if isinstance(each, ClassifierFeatures)), None)
    if judge is not None and pictures.labels is not None and _has_classes(pictures, judge.network):
        records.append(class_accuracy(subject, made, pictures.labels, judge, facts=facts))
    seen = standard.seen
    if panel.config.neighbours and out is not None and standard.pictures is not None and seen is not None:
        archive = Archive(standard.pictures, seen.outputs[main.name], None, [seen.pixels])
        records += score_neighbours(
            subject, pictures, made.outputs[main.name], archive, main, rows=panel.config.neighbours, facts=facts,
            sheet=out.with_name(f"{out.stem}-neighbours-{subject}.png"),
        )  # fmt: skip
    return records


def _has_classes(pictures: Pictures, classifier: Classifier) -> bool:
    """Whether the labels of images are a classifier's. Where only some class folders are there, they are not: folders
    are numbered from 0 all the same."""
    names, labels = pictures.class_names, pictures.labels
    assert labels is not None
    numbers = names == tuple(map(str, range(len(names)))) and len(names) <= classifier.num_classes
    if int(labels.min()) >= 0 and (numbers or len(names) == classifier.num_classes):
        return True
    print(
        f"class_accuracy of {pictures.name} left out: its labels are not the {classifier.num_classes} of the classifier"
    )
    return False


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
    return sample_scores(REAL, control, others, panel.extractors, **how)


def _save_statistics(path: Path, standard: Standard, panel: Panel) -> None:
    """One file for each network, measured on the images even where the reference states some."""
    seen = standard.seen
    assert seen is not None
    for extractor in panel.extractors:
        file = path if len(panel.extractors) == 1 else path.with_name(f"{path.stem}-{extractor.name}{path.suffix}")
        measured = gaussian(seen.outputs[extractor.name])
        save_reference(file, measured, features=extractor.identity(), pixels=seen.pixels)
        print(f"statistics of {seen.count} images: {file}")
