"""Which images are for training and which are held out, and how labels of any kind become integers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import DataConfig

# The division of a source is part of the data, so it must not follow run.seed.
SPLIT_SEED = 20211009
# The first name that is there wins: a held-out set that was tuned on is the second choice.
SPLIT_NAMES = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation")}
MOST_CLASSES = 1 << 20  # a larger label is no class but a damaged number
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")


def held_out(labels: np.ndarray, fraction: float, split: str) -> np.ndarray:
    """Sorted indices of the train or test part: every n-th image after a fixed shuffle within each label.

    Each label's share of the test part is exact to one image.

    Raises:
        ValueError: the fraction lies outside [0, 1) or leaves a part empty.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"data.test_fraction={fraction} must lie in [0, 1)")
    number = len(labels)
    count = round(number * fraction)
    if (split == "test" and count == 0) or (split == "train" and count == number):
        remedy = "change it, or set data.test_path"
        raise ValueError(f"data.test_fraction={fraction} of {number} images leaves no {split} image: {remedy}")
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(number)
    grouped = shuffled[np.argsort(labels[shuffled], kind="stable")]
    test = grouped[((np.arange(count) + 0.5) * number / max(count, 1)).astype(np.int64)]
    return np.sort(test) if split == "test" else np.setdiff1d(np.arange(number), test)


def required_path(config: DataConfig) -> str:
    """data.path.

    Raises:
        ValueError: it is not set.
    """
    if not config.path:
        raise ValueError(f"data.path is not set: data.source={config.source} needs to know where its images are")
    return config.path


def find_files(pattern: str, suffix: str, key: str) -> list[Path]:
    """Sorted files of a file name, a folder (searched whole), a glob, or a numbered range such as `{000..015}`.

    Raises:
        ValueError: nothing was found.
    """
    if Path(pattern).is_dir():
        found = sorted(Path(pattern).rglob(f"*{suffix}"))
    elif Path(pattern).is_file():
        found = [Path(pattern)]
    else:
        found = sorted(Path(path) for one in expand_range(pattern) for path in glob(one, recursive=True))
    found = [path for path in found if path.is_file()]
    if not found:
        raise ValueError(f"{key}={pattern}: no {suffix} file there (working folder: {Path.cwd()}); correct the path")
    return found


def expand_range(pattern: str) -> list[str]:
    """`a-{08..10}.tar` -> [`a-08.tar`, `a-09.tar`, `a-10.tar`], for any number of ranges."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    filled = (pattern[: match.start()] + number + pattern[match.end() :] for number in numbers)
    return [path for one in filled for path in expand_range(one)]


def choose_split(names: Iterable[str], split: str) -> str | None:
    """The member of `names` that stands for `split`; None if the names do not have both train and a held-out part."""
    there = list(names)
    chosen = {part: next((name for name in wanted if name in there), None) for part, wanted in SPLIT_NAMES.items()}
    return chosen[split] if all(chosen.values()) else None


def split_files(config: DataConfig, suffix: str) -> dict[str, list[Path]]:
    """Files of each part, {"train": ..., "test": ...}, by data.test_path or by names such as `train-00000-of-00005`.

    Without either there is only "all".
    """
    files = find_files(required_path(config), suffix, "data.path")
    named: dict[str, list[Path]] = {}
    for path in files:
        named.setdefault(_split_name(path), []).append(path)
    by_name = {part: choose_split(named, part) for part in SPLIT_NAMES}
    train = named[by_name["train"]] if by_name["train"] else files
    if config.test_path:
        return {"train": train, "test": find_files(config.test_path, suffix, "data.test_path")}
    return {"train": train, "test": named[by_name["test"]]} if by_name["test"] else {"all": files}


def _split_name(path: Path) -> str:
    """`train` for train.tar, train-00000-of-00005.parquet, train_3.tar and train/0000.parquet; else an empty string."""
    known = {name for names in SPLIT_NAMES.values() for name in names}
    first = re.split(r"[-_.\d]", path.name.lower())[0]
    return next((name for name in (first, path.parent.name.lower()) if name in known), "")


def encode_labels(values: Sequence[Any], names: tuple[str, ...], where: str) -> np.ndarray:
    """int64 [N]: integers as they are, strings as their place in `names`, None and negative numbers as -1.

    Raises:
        ValueError: a value that `names` does not have, or that is neither an integer nor a string.
    """
    place = {name: i for i, name in enumerate(names)}
    labels = np.empty(len(values), np.int64)
    for row, value in enumerate(values):
        if value is None:
            labels[row] = -1
        elif isinstance(value, str):
            labels[row] = place.get(value, len(names))
        elif isinstance(value, (int, np.integer)):
            labels[row] = max(int(value), -1)
        else:
            raise ValueError(f"{where}: label {value!r} is neither an integer nor a string; set data.label_column")
        if labels[row] >= len(names):
            raise ValueError(f"{where}: {value!r} is not among the {len(names)} training classes; correct the data")
    return labels


def label_names(values: Iterable[Any]) -> tuple[str, ...]:
    """Class names of training labels: the sorted strings themselves, or "0", "1", ... up to the largest integer."""
    known = {value for value in values if value is not None}
    texts = {value for value in known if isinstance(value, str)}
    if texts and texts != known:
        raise ValueError(f"labels mix strings such as {min(texts)!r} with numbers; correct them or data.label_column")
    largest = max((value for value in known if isinstance(value, int)), default=-1)
    if largest >= MOST_CLASSES:
        raise ValueError(f"a label is {largest:,}, but labels count classes from 0: correct it or data.label_column")
    return tuple(sorted(texts)) or tuple(str(number) for number in range(largest + 1))


def caption_texts(values: Sequence[Any], column: str) -> list[str]:
    """One caption for each value: a string as it is, of a list of strings each on a line of its own.

    Raises:
        ValueError: a value is neither.
    """
    lists = [[value] if isinstance(value, str) else value for value in values]
    if not all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in lists):
        raise ValueError(
            f"data.caption_column={column}: not every row holds a string, or a list of such; choose another"
        )
    return ["\n".join(texts) for texts in lists]


def digest(*parts: bytes | str | np.ndarray) -> str:
    """sha256 over the parts, each with its length."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part.tobytes() if isinstance(part, np.ndarray) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()
