"""What scores are called: which features they were taken on, and how few images.

A Frechet distance is called FID on Inception's features alone. Its bias falls with the number of images about as 1 / n
(Chong & Forsyth 2020, arXiv 1911.07023), so that below 10,000 the name says how many they were: `fid5k`, `fid500`.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

INCEPTION = {"inception": "", "inception-clean": "clean", "inception-antialias": "antialias"}
"""Features that a FID is taken on, and what its name says of their resize rule."""
ON_INCEPTION = {"fd": "fid", "rfd": "rfid", "fd_inf": "fid_inf", "is": "is"}
COUNTED = ("fd", "rfd")
UNCOUNTED = 10_000  # images from which on a name is silent about their number
RESERVED = re.compile(r"(inf|clean|antialias)(_.*)?")
FID_NAME = re.compile(r"(fid_inf|r?fid)(\d+k?)?(?:_(.+))?")
FEATURED_NAME = re.compile(r"(fd_inf|r?fd|is|lpips)_(.+)")

Better = Literal["higher", "lower", ""]
CHAPTERS: dict[str, dict[str, Better]] = {
    "Generators": {
        "fid": "lower", "fid_inf": "lower", "fd": "lower", "fd_inf": "lower", "kid": "lower", "is": "higher",
        "precision": "higher", "recall": "higher", "density": "higher", "coverage": "higher", "copies": "lower",
        "class_accuracy": "higher", "nll": "lower",
    },
    "Tokenizers": {
        "psnr": "higher", "ssim": "higher", "lpips": "lower", "rfid": "lower", "rfd": "lower", "usage": "higher",
        "usage_256": "higher", "perplexity": "higher",
    },
    "Probes": {"probe_top1": "higher", "probe_top5": "higher", "knn_top1": "higher"},
}  # fmt: skip
"""What each score tells of, and which way it is better."""
OTHERS = "Other scores"


class Name(NamedTuple):
    """The parts of a score's name: `fid5k_clean` is fid, 5k, clean; `fd_inf_random` is fd_inf, nothing, random."""

    score: str
    images: str
    features: str
    """Name of the features, or of Inception's resize rule, or of the LPIPS network."""


def score_name(score: str, *, features: str, n: int) -> str:
    """Name of `fd`, `rfd`, `fd_inf` or `is` on the features of an extractor, over n images.

    Raises:
        ValueError: the features are named like a part of a score's name.
    """
    assert score in ON_INCEPTION and n > 0, f"{score} of {n} images has no name"
    if features in INCEPTION:
        count = count_text(n) if score in COUNTED else ""
        return "_".join(filter(None, (ON_INCEPTION[score] + count, INCEPTION[features])))
    if RESERVED.fullmatch(features):
        raise ValueError(f"features named {features!r} would make misleading names of scores: rename the weights file")
    return f"{score}_{features}"


def count_text(n: int) -> str:
    """5,000 as 5k, 1,250 as it is; nothing from 10,000 on."""
    if n >= UNCOUNTED:
        return ""
    return str(n) if n % 1000 else f"{n // 1000}k"


def parts_of(name: str) -> Name:
    """The inverse of `score_name`; a name of another form is a score without count and features."""
    if found := FID_NAME.fullmatch(name):
        return Name(found[1], found[2] or "", found[3] or "")
    if found := FEATURED_NAME.fullmatch(name):
        return Name(found[1], "", found[2])
    return Name(name, "", "")


def base_name(name: str) -> str:
    """The name without the number of images: `fid` of `fid5k`, `fid_clean` of `fid500_clean`."""
    score, _, features = parts_of(name)
    return "_".join(filter(None, (score, features)))


def answers_to(name: str, wanted: str) -> int:
    """How well a name fits what a reader asks for: 3 the very name, 2 up to its number of images, 1 up to its features
    as well (`fd` finds `fd_random`), 0 not at all."""
    if name == wanted:
        return 3
    if base_name(name) == wanted:
        return 2
    return int(parts_of(name).score == wanted)


def chapter_of(name: str) -> str:
    """Under which title of CHAPTERS a score stands, else OTHERS."""
    score = parts_of(name).score
    return next((title for title, scores in CHAPTERS.items() if score in scores), OTHERS)


def rank(name: str) -> tuple[int, int]:
    """Place of a score in the order of CHAPTERS, unknown ones last."""
    title, score = chapter_of(name), parts_of(name).score
    return [*CHAPTERS, OTHERS].index(title), list(CHAPTERS.get(title, {score: ""})).index(score)


def better(name: str) -> Better:
    """Which way a score is better; empty if that is not known."""
    return CHAPTERS.get(chapter_of(name), {}).get(parts_of(name).score, "")
