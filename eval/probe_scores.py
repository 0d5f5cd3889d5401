"""Probes of a run's models: every asked tap on one curve, and records of the taps that held-out images choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.config import RunConfig
from engine.device import Device, exact_products
from engine.images import ImageSet
from engine.log import progress
from eval.config import ProbeConfig
from eval.extraction import Seen, extract
from eval.judge import data_facts
from eval.knn import classify
from eval.online_probe import score_heads, train_heads
from eval.pictures import Pictures, draw_indices, drawn
from eval.probe import Labelled, TapScore, best_tap, count_classes, held_out_split, probe_tap
from eval.protocol import Record, protocol, record
from eval.statistics import Estimate, proportion
from eval.taps import Representation, asked_representations

SEED = 0  # of which images are taken and which are held out
MANY = 100_000  # images times taps, from which on their features may take hundreds of megabytes


class KnnScore(NamedTuple):
    """Accuracy of k-NN at one tap: on held-out training images, and on test images."""

    held_out: float
    top1: Estimate


class Point(NamedTuple):
    """One tap on the curve of a model."""

    score: TapScore
    knn: KnnScore | None


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every probe of a run has in common."""

    config: ProbeConfig
    train_set: ImageSet
    rows: np.ndarray
    """The training images that may be used, of which some are held out."""
    test: Pictures
    run: RunConfig
    cache: Path
    batch_size: int
    device: Device

    def see(self, representations: Sequence[Representation], pictures: Pictures) -> Seen:
        """The features of a set of images (collective)."""
        return extract(
            representations, pictures, cache=self.cache, device=self.device, batch_size=self.batch_size,
            title=f"probe/{pictures.name}",
        )  # fmt: skip

    def labelled(self, seen: Seen, pictures: Pictures, name: str, tap: str) -> Labelled:
        """What a model says of a set of images at one tap, on the device."""
        assert pictures.labels is not None
        features, device = seen.outputs[name].rows(tap), self.device.device
        return Labelled(features.to(device), pictures.labels.to(device))


def score_probe(
    config: ProbeConfig,
    makers: Mapping[str, Callable[[], Representation]],
    *,
    train_set: ImageSet,
    test_set: ImageSet,
    run: RunConfig,
    cache: Path,
    batch_size: int,
    device: Device,
) -> tuple[list[Record], dict[str, Any]]:
    """Probe the taps that the configuration asks for: records, and the content of eval/probe.json.

    Every process of a run must call it; all but the first get nothing, nor does any where the training images have
    labels of fewer than two classes, or the run none of the models that are asked for.

    Args:
        makers: for each model that the run has, by the name that begins its taps, what opens it.
        cache: folder of features.
        batch_size: images per forward pass of a model.

    Raises:
        ValueError: a tap that its model does not have, too few images to hold some out and find neighbours, or test
            images without labels.
    """
    rows, test_rows = _drawn_rows(config, train_set, test_set)
    if not len(rows):
        if device.is_main:
            print("probe left out: the images have no labels of at least two classes")
        return [], {}
    job = Job(
        config=config,
        train_set=train_set,
        rows=rows,
        test=drawn(test_set, test_rows, name="test images"),
        run=run,
        cache=cache,
        batch_size=batch_size,
        device=device,
    )
    representations = asked_representations(config.taps, makers, device.device)
    if not representations:
        if device.is_main:
            print(f"probe left out: the run has no model that eval.probe.taps={list(config.taps)} names")
        return [], {}
    if device.is_main:
        _tell_size(job, representations)
    curves, seen = (_online if config.protocol == "mae" else _offline)(job, representations)
    if not device.is_main:
        return [], {}
    facts = {**data_facts(test_set), "reference": seen, "num_real": job.test.count}
    records, table = [], []
    for representation, curve in zip(representations, curves, strict=True):
        records += _records(representation, curve, facts, config, len(job.rows))
        table += [_row(representation.subject, point, config) for point in curve]
    return records, {"protocol": records[0]["protocol"], "curve": table}


def check_counts(config: ProbeConfig, train_set: ImageSet, test_set: ImageSet) -> None:
    """Raise ValueError if there are too few labelled images for what the configuration asks."""
    _drawn_rows(config, train_set, test_set)


def _drawn_rows(config: ProbeConfig, train_set: ImageSet, test_set: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """The labelled images that are used, of the training and of the test split; none if there are no two classes."""
    labelled, tested = (np.flatnonzero(images.labels >= 0) for images in (train_set, test_set))
    if len(set(train_set.labels[labelled].tolist())) < 2:
        return labelled[:0], tested[:0]
    if not len(tested):
        raise ValueError("the training images have labels, the test images none: give labelled ones as data.test_path")
    rows = draw_indices(labelled, config.num_train, seed=SEED)
    fitted, _ = held_out_split(len(rows), config.held_out, SEED)
    if config.protocol == "lbfgs" and config.knn_k > len(fitted):
        raise ValueError(
            f"eval.probe.knn_k={config.knn_k} neighbours, but of the training images only {len(fitted)} are labelled"
            " and not held out: lower it, or set 0 to leave k-NN out"
        )
    return rows, draw_indices(tested, config.num_test, seed=SEED)


def _tell_size(job: Job, representations: Sequence[Representation]) -> None:
    """Say how much room the features of plain images take, where that is much."""
    plain = job.test.count + (0 if job.config.protocol == "mae" else len(job.rows))
    if plain * sum(len(representation.taps) for representation in representations) < MANY:
        return
    image = job.train_set.load(job.rows[:1])["images"].to(job.device.device)
    with torch.inference_mode():
        width = sum(seen.shape[1] for each in representations for seen in each.outputs(image).values())
    print(
        f"probe: features of {plain:,} images take {4 * plain * width / 1e9:.3g} GB in {job.cache}, which may be"
        " deleted afterwards; fewer eval.probe.taps, or a lower num_train and num_test, take less"
    )


Probed = tuple[list[list[Point]], list[str]]  # a curve for each model; what identifies training and test images


def _offline(job: Job, representations: Sequence[Representation]) -> Probed:
    """Logistic regression and k-NN on features of the images as they are; the first process alone fits."""
    sets = drawn(job.train_set, job.rows, name="training images"), job.test
    seen = [job.see(representations, pictures) for pictures in sets]
    if not job.device.is_main:
        return [], []
    curves: list[list[Point]] = []
    total = sum(len(representation.taps) for representation in representations)
    with exact_products(), progress(total=total, title="probe/fit", unit="tap") as bar:
        for representation in representations:
            curves.append([])
            for tap in representation.taps:
                train, test = (job.labelled(*side, representation.name, tap) for side in zip(seen, sets, strict=True))
                curves[-1].append(_probe(tap, train, test, job.config))
                bar.update(1)
    return curves, [each.pixels for each in seen]


def _online(job: Job, representations: Sequence[Representation]) -> Probed:
    """Heads trained on features of augmented images; held-out and test images are seen as they are."""
    fitted, held = (job.rows[part.numpy()] for part in held_out_split(len(job.rows), job.config.held_out, SEED))
    sets = drawn(job.train_set, held, name="held-out images"), job.test
    seen = [job.see(representations, pictures) for pictures in sets]
    curves: list[list[Point]] = []
    for representation in representations:
        heads = train_heads(
            job.config.online, representation, images=job.train_set, rows=fitted, run=job.run, device=job.device
        )
        curves.append([])
        for tap in representation.taps if job.device.is_main else ():
            held_out, test = (job.labelled(*side, representation.name, tap) for side in zip(seen, sets, strict=True))
            score = score_heads(heads, tap, held_out=held_out, test=test)
            _tell_end(score, "learning rate", "online.learning_rates")
            curves[-1].append(Point(score, None))
    return curves, [job.train_set.identity()["digest"], *(each.pixels for each in seen)]


def _probe(tap: str, train: Labelled, test: Labelled, config: ProbeConfig) -> Point:
    """Logistic regression and k-NN at one tap."""
    score = probe_tap(tap, *train, *test, c_grid=config.c_grid, held_out=config.held_out, seed=SEED)
    _tell_end(score, "C", "c_grid")
    return Point(score, _knn(train, test, config) if config.knn_k else None)


def _tell_end(score: TapScore, what: str, key: str) -> None:
    if score.at_end:
        found = f"the best {what} of {score.tap} is {score.setting:g}, at an end of eval.probe.{key}"
        print(f"probe: {found}; one beyond may be better")


def _knn(train: Labelled, test: Labelled, config: ProbeConfig) -> KnnScore:
    """k-NN among the training images; for the held-out ones among the others."""
    num_classes = count_classes(train.labels)
    fitted, held = (
        Labelled(*(each[rows.to(each.device)] for each in train))
        for rows in held_out_split(len(train.labels), config.held_out, SEED)
    )

    def hits(bank: Labelled, queries: Labelled) -> int:
        found = classify(
            queries.features, *bank, k=config.knn_k, num_classes=num_classes, temperature=config.knn_temperature
        )
        return int((found == queries.labels).sum())

    return KnnScore(hits(fitted, held) / len(held.labels), proportion(hits(train, test), len(test.labels)))


def _records(
    representation: Representation, curve: Sequence[Point], facts: Mapping[str, Any], config: ProbeConfig, n_train: int
) -> list[Record]:
    """The scores of the taps that held-out images choose: one tap for the linear probe, one for k-NN."""
    shared = {"held_out": config.held_out, "num_train": n_train}
    told, n, subject = {**facts, "subject": representation.facts}, facts["num_real"], representation.subject
    best, stated = best_tap([point.score for point in curve]), protocol(**told, settings={**shared, **_fitting(config)})
    scores = [("probe_top1", best.top1, best.tap, stated)]
    if best.top5 is not None:
        scores.append(("probe_top5", best.top5, best.tap, stated))
    nearest = [(point.knn, point.score.tap) for point in curve if point.knn is not None]
    if nearest:
        found, tap = max(nearest, key=lambda pair: pair[0].held_out)
        votes = {"k": config.knn_k, "temperature": config.knn_temperature, "similarity": "cosine"}
        scores.append(("knn_top1", found.top1, tap, protocol(**told, settings={**shared, **votes})))
    return [record(name, subject, score, n=n, protocol=stated, tap=tap) for name, score, tap, stated in scores]


def _fitting(config: ProbeConfig) -> dict[str, Any]:
    """How a linear classifier is fitted."""
    if config.protocol == "mae":
        return {"protocol": "mae", **asdict(config.online)}
    return {"protocol": "lbfgs", "features": "standardised", "c_grid": config.c_grid}


def _row(subject: str, point: Point, config: ProbeConfig) -> dict[str, Any]:
    score, nearest = point
    return {
        "family": subject,
        "tap": score.tap,
        "learning_rate" if config.protocol == "mae" else "c": score.setting,
        "held_out_top1": score.held_out,
        "test_top1": score.top1.value,
        "interval": _bounds(score.top1),
        "test_top5": None if score.top5 is None else score.top5.value,
        "knn_held_out_top1": None if nearest is None else nearest.held_out,
        "knn_top1": None if nearest is None else nearest.top1.value,
        "knn_interval": None if nearest is None else _bounds(nearest.top1),
    }


def _bounds(estimate: Estimate) -> list[float]:
    return list(estimate.interval or (math.nan, math.nan))
