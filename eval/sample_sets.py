"""The folders of samples that a run's scores are of: each family's, its variants', and the best of more candidates."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from engine.checkpoint import load_model
from eval.classifier import check_classes
from eval.features import Extractor
from eval.generator_scores import ensure_samples
from eval.rejection import (
    Picker,
    check_no_judge,
    num_candidates,
    open_picker,
    sample_accepted,
    subject_name,
)
from eval.subject import Subject
from eval.variants import Sampling
from generator.sample_folder import read_samples


class Drawn(NamedTuple):
    """A folder of samples, how they were drawn, and under which name."""

    sampling: Sampling
    folder: Path


def draw_all(subject: Subject, extractors: Sequence[Extractor]) -> list[Drawn]:
    """Folders of all samples that are to be scored: as they are drawn, and the best of more candidates."""
    num, found = subject.config.num_samples, []
    picked = _picked(subject)
    picker = _picker(subject, extractors) if picked else None
    for sampling in subject.samplings:
        folder = ensure_samples(run=subject.run, sampling=sampling, num=num, device=subject.device)
        found.append(Drawn(sampling, folder))
        if picker and sampling.subject in picked:  # the family's own, not a variant
            found += _accepted(subject, sampling, picker, folder)
    return found


def _picked(subject: Subject) -> list[str]:
    """The families whose samples a classifier is to pick from: those with classes, if any acceptance is asked for."""
    if not subject.config.rejection.acceptances:
        return []
    picked = [family for family in subject.families if load_model(subject.run.folder / family)[0]["num_classes"]]
    for family in subject.families:
        if family not in picked and subject.device.is_main:
            print(f"rejection sampling of {family} left out: it was trained without classes")
    return picked


def remove_unasked(subject: Subject, folders: Sequence[Drawn]) -> None:
    """Remove samples of variants, snapshots and acceptances that are no longer asked for; candidates stay."""
    kept = {folder for _, folder in folders}
    for family in subject.families:
        for folder in (subject.run.folder / "samples").glob(f"{family}@*"):
            if folder not in kept and read_samples(folder) is not None:
                shutil.rmtree(folder)


def _picker(subject: Subject, extractors: Sequence[Extractor]) -> Picker:
    """The classifier for rejection, once it is sure that it may pick."""
    check_classes(subject.train_set, asked="eval.rejection.acceptances is set", remedy="leave it empty")
    picker = open_picker(
        subject.config.rejection.classifier,
        train_set=subject.train_set,
        test_set=subject.test_set,
        run=subject.run,
        device=subject.device,
    )
    check_no_judge(picker, extractors)
    return picker


def _accepted(subject: Subject, plain: Sampling, picker: Picker, there: Path) -> list[Drawn]:
    """A folder for each acceptance; candidates are drawn once, and begin with the samples that are `there` already."""
    num, acceptances = subject.config.num_samples, subject.config.rejection.acceptances
    folder, found = subject.run.folder / "samples", []
    for acceptance in acceptances:
        name = subject_name(plain.family, acceptance)
        kept = sample_accepted(
            run=subject.run, config=plain.config, family=plain.family, device=subject.device, picker=picker,
            acceptance=acceptance, out=folder / name, pool=folder / f"{plain.family}-candidates", num=num,
            largest=num_candidates(num, min(acceptances)), known=[there],
        )  # fmt: skip
        found.append(Drawn(plain._replace(subject=name), kept))
    return found
