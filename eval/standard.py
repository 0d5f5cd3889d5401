"""What generated images are held against: real images as the networks see them, or the statistics in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from engine.images import ImageSet
from eval.config import EvalConfig
from eval.extraction import Extracted, Seen
from eval.features import Extractor
from eval.panel import Panel
from eval.pictures import Pictures, draw_indices, drawn
from eval.reference_files import Reference, check_reference, open_reference
from eval.statistics import Gaussian, grouped_moments


@dataclass(frozen=True, kw_only=True)
class Standard:
    """Real images, or what is known of them."""

    pictures: Pictures | None = None
    """The images, if there are any."""
    seen: Seen | None = None
    """The images as the networks see them; scores that hold images against images need them."""
    gaussians: Mapping[str, Gaussian] = field(default_factory=dict)
    """Mean and covariance by the network's name."""
    stated: Mapping[str, Any] = field(default_factory=dict)
    """What a file says of itself, by the network's name; these gaussians are not of the images `seen`."""

    def facts(self, features: str) -> dict[str, Any]:
        """What the protocol of a Frechet distance says of its reference."""
        if features in self.stated:
            told = self.stated[features]
            pixels = told.get("pixels") or "not stated"
            known = pixels if pixels != "not stated" else told["sha256"]
            return {"reference": known, "num_real": self.gaussians[features].n or None, "reference_file": told}
        return self.image_facts()

    def image_facts(self) -> dict[str, Any]:
        """What the protocol of a score that is held against the images says of them."""
        assert self.seen is not None
        told = {} if self.pictures is None else self.pictures.facts
        return {"reference": self.seen.pixels, "num_real": self.seen.count, "reference_images": told or None}


def see_standard(pictures: Pictures, panel: Panel) -> Standard:
    """The standard that a set of real images is (every process must call it)."""
    return standard_of(panel.see(pictures), panel, pictures)


def standard_of(seen: Seen, panel: Panel, pictures: Pictures | None = None) -> Standard:
    """The standard that real images are which have been seen."""
    gaussians = {each.name: gaussian(seen.outputs[each.name]) for each in panel.extractors}
    return Standard(pictures=pictures, seen=seen, gaussians=gaussians)


def gaussian(extracted: Extracted) -> Gaussian:
    """Mean and covariance of features, from one pass over them.

    Raises:
        ValueError: fewer than two images.
    """
    return grouped_moments(extracted.parts(), extracted.count, groups=1)[0].gaussian()


def open_standard(train_set: ImageSet, test_set: ImageSet, panel: Panel) -> tuple[Standard, Seen | None]:
    """What eval.reference names, and as many other real images as samples are scored, to hold against it; None where
    there are not enough of them (every process must call it).

    Raises:
        ValueError: as `named_reference`.
    """
    num, wish = panel.config.num_samples, panel.config.reference
    if wish == "equal":
        order = draw_indices(np.arange(len(train_set)), 2 * num, seed=0)
        reference, control = (drawn(train_set, part, name="real") for part in (order[:num], order[num:]))
        return see_standard(reference, panel), panel.see(control)
    if wish == "all":
        standard = see_standard(training_pictures(train_set), panel)
    else:
        standard = stated_standard(named_reference(panel.config, train_set.size, panel.extractors), panel)
    if len(test_set) < num:
        if panel.device.is_main:
            print(f"scores of real images left out: {num} are needed, the test split has {len(test_set)}")
        return standard, None
    control = drawn(test_set, draw_indices(np.arange(len(test_set)), num, seed=0), name="real")
    return standard, panel.see(control)


def training_pictures(train_set: ImageSet) -> Pictures:
    """All training images, in an order without regard to classes."""
    return drawn(train_set, draw_indices(np.arange(len(train_set)), 0, seed=0), name="training images")


def named_reference(config: EvalConfig, size: int, extractors: Sequence[Extractor]) -> Reference:
    """The file or folder that eval.reference names.

    Raises:
        ValueError: nothing that can be read there, or nothing that these extractors can be held against.
    """
    reference = open_reference(config.reference, size=size)
    check_usable(reference, config, extractors)
    return reference


def check_usable(reference: Reference, config: EvalConfig, extractors: Sequence[Extractor]) -> None:
    """Raise ValueError if generated images cannot be held against a reference: too few images, or statistics, without
    images, of other features than all of these."""
    pictures, least = reference.pictures, config.least_images
    if pictures is None:
        _fitting(reference, extractors)
    elif pictures.count < least:
        raise ValueError(
            f"reference {pictures.name} has {pictures.count} images, but with eval.convention={config.convention} it"
            f" takes {least}: give more"
        )


def stated_standard(reference: Reference, panel: Panel) -> Standard:
    """The standard that a reference is: images, statistics, or both (every process must call it).

    Raises:
        ValueError: no images, and statistics of other features than the networks'.
    """
    pictures = reference.pictures and replace(reference.pictures, name="reference")
    held = Standard() if pictures is None else see_standard(pictures, panel)
    if reference.gaussian is None:
        return held
    fitting = _fitting(reference, panel.extractors)
    if panel.device.is_main:
        _tell(reference, fitting, panel)
    return Standard(
        pictures=held.pictures,
        seen=held.seen,
        gaussians={**held.gaussians, **dict.fromkeys(fitting, reference.gaussian)},
        stated=dict.fromkeys(fitting, reference.identity),
    )


def _tell(reference: Reference, fitting: Sequence[str], panel: Panel) -> None:
    """Say which networks the statistics of a file do not serve, and what is done instead."""
    others = [extractor.name for extractor in panel.extractors if extractor.name not in fitting]
    if others:
        instead = "no distance of theirs" if reference.pictures is None else "its images serve them"
        print(f"statistics of {reference.identity['file']} are not of {', '.join(others)}: {instead}")


def _fitting(reference: Reference, extractors: Sequence[Extractor]) -> list[str]:
    """The networks that a stated Gaussian is of; where it is of none and there are no images, raises the ValueError of
    the last one."""
    found, refusal = [], None
    for extractor in extractors:
        try:
            check_reference(reference, extractor.identity())
            found.append(extractor.name)
        except ValueError as error:
            refusal = error
    if refusal is not None and not found and reference.pictures is None:
        raise refusal
    return found
