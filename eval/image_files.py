"""Images of any maker as `Pictures`: a folder, a zip, an array (.npz, .npy) or parquet files. Nothing is ever skipped:
a score depends on how many images there are."""

from __future__ import annotations

import warnings
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from engine.config import DataConfig
from engine.decode import center_crop, decode
from engine.device import cpu_quota
from engine.splits import expand_range, label_names, split_files
from engine.tables import list_parquet
from eval.array_files import open_npy, open_npz, to_tensor
from eval.image_trees import Files, folder_tree, list_tree, zip_tree
from eval.pictures import Pictures

READERS = 8  # at most so many threads decode ahead
KINDS = ".zip, .npz, .npy, .parquet, or a folder of images"
ARRAYS = {".npz": open_npz, ".npy": open_npy}
JPEG = b"\xff\xd8\xff"


def open_pictures(path: str | Path, *, size: int | None = None) -> Pictures:
    """The images at `path`, in the order of their names or rows.

    A folder or a zip may hold class folders, our samples.json or EDM's dataset.json; an .npz holds `arr_0` uint8
    [N, H, W, 3] and perhaps labels `arr_1`; parquet files (one, or a glob) have the Hugging Face image layout.

    Args:
        size: crop every image to a square of so many pixels, as ADM does; without it all must have one size.

    Raises:
        ValueError: nothing there, or nothing that is such a set of images. Later, from `load`: an image that is cut,
            broken, or of another size than the first.
    """
    path = Path(path)
    if size is not None and size < 1:
        raise ValueError(f"size={size} must be at least 1 pixel")
    if path.suffix.lower() in ARRAYS and path.is_file():
        return _of_array(path, size)
    kind, files = _list(path)
    return _of_files(path, kind, files, size)


def _list(path: Path) -> tuple[str, Files]:
    """Encoded images, and what kind of place they are in."""
    suffix = path.suffix.lower()
    if path.is_dir():
        _refuse_run(path)
        return "folder", list_tree(folder_tree(path))
    if suffix == ".parquet" and any(glob(one, recursive=True) for one in expand_range(str(path))):
        return "parquet", _list_parquet(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder (working folder: {Path.cwd()}); give {KINDS}")
    if suffix == ".zip":
        return "zip", list_tree(zip_tree(path))
    raise ValueError(f"{path}: images are not read from {suffix or 'a file without suffix'}; give {KINDS}")


def _refuse_run(folder: Path) -> None:
    if (folder / "config.yaml").is_file():
        made = sorted(str(told.parent) for told in (folder / "samples").glob("*/samples.json"))
        remedy = f"give its samples: {', '.join(made)}" if made else "sample from it, then give its samples/<family>"
        raise ValueError(f"{folder} is a run, not a folder of images; {remedy}")


def _list_parquet(path: Path) -> Files:
    """All rows of the files."""
    config = DataConfig(source="parquet", path=str(path), test_fraction=0.0)
    if "all" not in split_files(config, ".parquet"):
        raise ValueError(f"{path}: both training and held-out files; give a glob that fits one of them")
    try:
        listing = list_parquet(config, "train")
    except (ValueError, OSError) as error:
        remedy = "; name the columns image and label" if "_column" in str(error) else ""
        raise ValueError(f"{path}: {error}{remedy}") from error
    count = len(listing.labels)
    if not count:
        raise ValueError(f"{path}: no row in it; give another file")
    labels = listing.labels if listing.labels.max() >= 0 else None
    return Files(count=count, read=listing.read, name=listing.name, labels=labels, class_names=listing.class_names)


def _of_files(path: Path, kind: str, files: Files, size: int | None) -> Pictures:
    """Pictures that are decoded when they are loaded; the first one is decoded now and gives the size."""
    width, height = _picture(files, 0, size).size
    facts = _facts(path, kind, files.count, (height, width), size)

    def load(start: int, stop: int) -> Tensor:
        _check_range(path, start, stop, files.count)
        images = np.empty((stop - start, 3, height, width), np.uint8)
        for row, index in enumerate(range(start, stop)):
            picture = _picture(files, index, size)
            if picture.size != (width, height):
                raise _other_size(files.name(index), picture.size, files.name(0), (width, height))
            images[row] = np.asarray(picture).transpose(2, 0, 1)
        return torch.from_numpy(images)

    if _is_lossy(files):
        facts["lossy"] = True
        warnings.warn(
            f"{path} holds JPEG files. Photographs mostly are such; but samples that are saved as JPEG score otherwise "
            "than the same samples as PNG, so save samples as PNG",
            stacklevel=3,
        )
    labels = None if files.labels is None else torch.from_numpy(files.labels)
    return Pictures(
        name=str(path),
        count=files.count,
        load=load,
        labels=labels,
        class_names=files.class_names,
        facts={**facts, **files.facts},
        workers=min(READERS, cpu_quota()),
    )


def _of_array(path: Path, size: int | None) -> Pictures:
    """Pictures of an array, whose pages are read when they are loaded."""
    pixels, labels = ARRAYS[path.suffix.lower()](path)  # [N, H, W, 3]
    count, height, width, _ = pixels.shape
    square = size is None or (height, width) == (size, size)

    def load(start: int, stop: int) -> Tensor:
        _check_range(path, start, stop, count)
        block = np.asarray(pixels[start:stop])
        return to_tensor(block if square or size is None else _cropped(block, size))

    labels = labels if labels is not None and labels.max() >= 0 else None
    return Pictures(
        name=str(path),
        count=count,
        load=load,
        labels=None if labels is None else torch.from_numpy(labels),
        class_names=() if labels is None else label_names(labels.tolist()),
        facts=_facts(path, path.suffix.lower()[1:], count, (height, width) if size is None else (size, size), size),
        workers=min(READERS, cpu_quota()),
    )


def _facts(path: Path, kind: str, count: int, shape: tuple[int, int], size: int | None) -> dict[str, Any]:
    """What a protocol tells of the images; `shape` is height and width after the crop."""
    crop = "as stored" if size is None else "adm_center"
    return {"kind": kind, "path": str(path), "images": count, "size": list(shape), "crop": crop}


def _check_range(path: Path, start: int, stop: int, count: int) -> None:
    if not 0 <= start <= stop <= count:
        raise ValueError(f"{path}: images {start} to {stop} are asked for, but there are {count}; ask for fewer")


def _picture(files: Files, index: int, size: int | None) -> Image.Image:
    """RGB, cropped if `size` says so."""
    try:
        picture = decode(files.read(index))
    except MemoryError:
        raise
    except Exception as error:  # broken files make Pillow's readers raise nearly anything
        reason = "no image format" if isinstance(error, UnidentifiedImageError) else f"{type(error).__name__}: {error}"
        remedy = "write it again; none is skipped, as a score depends on how many images there are"
        raise ValueError(f"{files.name(index)}: not a readable image ({reason}); {remedy}") from error
    return picture if size is None else center_crop(picture, size)


def _cropped(block: np.ndarray, size: int) -> np.ndarray:
    """uint8 [B, H, W, 3] -> [B, size, size, 3]."""
    rows = [np.asarray(center_crop(Image.fromarray(row), size)) for row in block]
    return np.stack(rows) if rows else np.empty((0, size, size, 3), np.uint8)


def _other_size(name: str, found: tuple[int, int], first: str, wanted: tuple[int, int]) -> ValueError:
    """Sizes are width and height."""
    sizes = f"{name} has {found[0]} x {found[1]} pixels, but {first} has {wanted[0]} x {wanted[1]}"
    return ValueError(f"{sizes}; give --size to crop all of them to one size, or scale them yourself")


def _is_lossy(files: Files) -> bool:
    """Whether a file name says JPEG, or the first image is one."""
    first = files.read(0)
    return files.jpeg or (isinstance(first, bytes) and first.startswith(JPEG))
