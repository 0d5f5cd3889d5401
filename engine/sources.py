"""The sources by name, and those whose images are files or arrays: digits, folder, torchvision."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from engine.config import DataConfig
from engine.hub import list_hub
from engine.images import ImageSet, Listing
from engine.splits import IMAGE_SUFFIXES, choose_split, digest, encode_labels, held_out, label_names, required_path
from engine.tables import list_parquet
from engine.tars import list_webdataset

COLUMN_KEYS = ("image_column", "label_column", "caption_column")
COLUMNS_OF = {"digits": (), "torchvision": (), "folder": ("caption_column",)}


def open_images(config: DataConfig, split: Literal["train", "test"]) -> ImageSet:
    """One split of the source that `config` names; the test split is always centre-cropped and never mirrored.

    Raises:
        ValueError: the images are not there, or a key does not fit the source.
    """
    if config.size < 1:
        raise ValueError(f"data.size={config.size} must be at least 1 pixel")
    _refuse_idle_keys(config)
    listing = SOURCES[config.source](config, split)
    if len(listing.labels) == 0:
        raise ValueError(f"data.path={config.path}: the {split} split of data.source={config.source} holds no image")
    path = config.test_path if split == "test" and config.test_path else config.path
    return ImageSet(
        listing,
        size=config.size,
        split=split,
        origin={"source": config.source, "path": path, "name": config.name},
        crop=config.crop if split == "train" else "center",
        flip=config.flip and split == "train",
        max_corrupt=config.max_corrupt,
        workers=config.workers,
    )


def _refuse_idle_keys(config: DataConfig) -> None:
    allowed = COLUMNS_OF.get(config.source, COLUMN_KEYS)
    for key in COLUMN_KEYS:
        value = getattr(config, key)
        if value is not None and key not in allowed:
            raise ValueError(f"data.{key}={value} has no meaning for data.source={config.source}: remove it")
    if config.test_path and config.source in ("digits", "torchvision"):
        raise ValueError(f"data.test_path={config.test_path} has no meaning for data.source={config.source}: remove it")


def list_digits(config: DataConfig, split: str) -> Listing:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, 80 % train, 20 % test; the crop enlarges them smoothly."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)  # [N, 8, 8], grey levels 0..16 -> 0..255
    labels = data.target.astype(np.int64)
    listing = Listing(
        labels=labels,
        class_names=tuple(str(digit) for digit in range(10)),
        read=lambda index: Image.fromarray(pixels[index]),
        name=lambda index: f"digit {index}",
        digest=digest(pixels, labels),
    )
    return listing.subset(held_out(labels, 0.2, split))


def list_folder(config: DataConfig, split: str) -> Listing:
    """A folder of class folders, or of images without labels; `train` beside `test` or `val` inside it are its splits.

    data.caption_column is the suffix of a text file beside each image, such as `txt`.
    """
    roots = _folder_roots(config)
    classes = _class_folders(roots["train"], "data.path")
    root = roots[split]
    names, sizes, found = _list_files(root, classes)
    labels = encode_labels(found, classes, f"class folders of {root}") if classes else np.full(len(found), -1)

    def read(index: int) -> bytes:
        return (root / os.fsdecode(names[index])).read_bytes()

    listing = Listing(
        labels=labels,
        class_names=classes,
        captions=_sidecars(root, names, config.caption_column) if config.caption_column else None,
        read=read,
        name=lambda index: str(root / os.fsdecode(names[index])),
        digest=digest(labels, names, sizes),
    )
    return listing if roots["test"] != roots["train"] else listing.subset(held_out(labels, config.test_fraction, split))


def _folder_roots(config: DataConfig) -> dict[str, Path]:
    base = Path(required_path(config))
    for key, path in (("data.path", base), ("data.test_path", Path(config.test_path or base))):
        if not path.is_dir():
            raise ValueError(f"{key}={path}: no such folder (working folder: {Path.cwd()}); correct the path")
    inside = [entry.name for entry in base.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    train, test = choose_split(inside, "train"), choose_split(inside, "test")
    # A lone folder `train` is a split; among others, without a test split, it is a class (of locomotives, say).
    train = "train" if inside == ["train"] else train
    train_root = base / train if train else base
    if config.test_path:
        return {"train": train_root, "test": Path(config.test_path)}
    return {"train": train_root, "test": base / test if test else train_root}


def _class_folders(root: Path, key: str) -> tuple[str, ...]:
    """Sorted names of the subfolders that hold images; none if the images lie in the root itself."""
    entries = _sorted_entries(root)
    folders = [entry.name for entry in entries if entry.is_dir()]
    classes = tuple(name for name in folders if next(_walk(root / name), None) is not None)
    loose = next((entry.name for entry in entries if _is_image(entry)), None)
    if classes and loose:
        raise ValueError(f"{key}={root}: {loose} lies beside class folders such as {classes[0]}; move it away")
    if not classes and not loose:
        raise ValueError(f"{key}={root}: no image in it; known suffixes: {' '.join(IMAGE_SUFFIXES)}")
    return classes


def _walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Image files under `folder`, in sorted order."""
    for entry in _sorted_entries(folder):
        if entry.is_dir():
            yield from _walk(Path(entry.path))
        elif _is_image(entry):
            yield entry


def _sorted_entries(folder: Path) -> list[os.DirEntry[str]]:
    """Files and folders that are not hidden."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file()


def _list_files(root: Path, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Names relative to the root as a byte array (a list of strings is copied page by page into forked processes)."""
    names, sizes, found = [], [], []
    for entry in _walk(root):
        relative = os.path.relpath(entry.path, root)
        names.append(os.fsencode(relative))
        sizes.append(entry.stat().st_size)
        found.append(Path(relative).parts[0] if classes else "")
    return np.array(names, dtype=np.bytes_), np.array(sizes, np.int64), found


def _sidecars(root: Path, names: np.ndarray, suffix: str) -> list[str]:
    texts = [(root / os.fsdecode(name)).with_suffix(f".{suffix.lstrip('.')}") for name in names]
    missing = next((path for path in texts if not path.is_file()), None)
    if missing:
        raise ValueError(f"data.caption_column={suffix}: {missing} is missing; every image needs a text file beside it")
    return [_sidecar(path) for path in texts]


def _sidecar(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}): save it as such") from error


def list_torchvision(config: DataConfig, split: str) -> Listing:
    """Any class of torchvision.datasets, named by data.name; fetched into data.path if it is not there."""
    from torchvision import datasets

    builder = getattr(datasets, config.name or "", None)
    if not (inspect.isclass(builder) and issubclass(builder, datasets.VisionDataset)):
        raise ValueError(f"data.name={config.name} is no class of torchvision.datasets; CIFAR10 is one")
    dataset, own_split = _build_torchvision(builder, required_path(config), split)
    labels = _torchvision_labels(dataset)
    given = getattr(dataset, "classes", None) or label_names(labels[labels >= 0].tolist())
    names = tuple(name if isinstance(name, str) else name[0] for name in given)
    content = np.asarray(dataset.data) if hasattr(getattr(dataset, "data", None), "__array__") else b""
    listing = Listing(
        labels=labels,
        class_names=names if labels.max(initial=-1) >= 0 else (),
        read=lambda index: dataset[index][0],
        name=lambda index: f"{config.name}[{index}]",
        digest=digest(str(config.name), labels, content),
    )
    return listing if own_split else listing.subset(held_out(labels, config.test_fraction, split))


def _build_torchvision(builder: Any, root: str, split: str) -> tuple[Any, bool]:
    """The data set, and whether `split` is its own rather than to be held out of the whole."""
    parameters = inspect.signature(builder).parameters
    if "train" in parameters:
        return _fetched(builder, root, parameters, train=split == "train"), True
    if "split" not in parameters:
        return _fetched(builder, root, parameters), False
    wanted = ("train", "trainval", "train-standard") if split == "train" else ("test", "val", "valid")
    for name in wanted:
        try:
            return _fetched(builder, root, parameters, split=name), True
        except ValueError as error:
            refusal = error
    raise ValueError(f"data.name={builder.__name__}: no {split} split among {wanted}: {refusal}") from refusal


def _fetched(builder: Any, root: str, parameters: Any, **options: Any) -> Any:
    try:
        return builder(root, **options)
    except (RuntimeError, FileNotFoundError, NotADirectoryError) as error:
        if "download" not in parameters:
            raise ValueError(f"data.path={root}: {error}") from error
    try:
        return builder(root, download=True, **options)
    except (RuntimeError, OSError) as error:
        fault = f"{builder.__name__} is not there and cannot be fetched: {error}"
        raise ValueError(f"data.path={root}: {fault}; put its files there") from error


def _torchvision_labels(dataset: Any) -> np.ndarray:
    """int64 [N] without decoding an image where the class keeps its labels; else by reading every item once."""
    for attribute in ("targets", "labels", "_labels", "y"):
        values = getattr(dataset, attribute, None)
        if values is not None and len(values) == len(dataset) and np.asarray(values).ndim == 1:
            return np.asarray(values, dtype=np.int64)
    target = dataset[0][1] if len(dataset) else None
    if not isinstance(target, (int, np.integer)):
        return np.full(len(dataset), -1)
    return np.array([int(dataset[index][1]) for index in range(len(dataset))], np.int64)


# Each takes (config, split) and returns the listing of that split.
SOURCES: dict[str, Callable[[DataConfig, str], Listing]] = {
    "digits": list_digits,
    "folder": list_folder,
    "torchvision": list_torchvision,
    "parquet": list_parquet,
    "hf": list_hub,
    "webdataset": list_webdataset,
}
