"""Image files under names such as `cat/001.png`, in a folder or a zip: which of them count, and their classes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from engine.splits import IMAGE_SUFFIXES, choose_split, encode_labels, label_names
from eval.zip_members import list_members, read_member
from generator.sample_folder import KINDS, png_path

SHARD_DIGITS = 5  # EDM's tools spread one set over folders such as 00012, which are no classes


@dataclass(frozen=True)
class Tree:
    """Names of files relative to a root, with "/" between parts, sorted; hidden ones are left out."""

    title: str
    names: list[str]
    read: Callable[[str], bytes]

    def below(self, top: str) -> Tree:
        """What lies in the folder `top`."""
        start, read = f"{top}/", self.read
        inside = [name.removeprefix(start) for name in self.names if name.startswith(start)]
        return Tree(f"{self.title}/{top}", inside, lambda name: read(start + name))

    def images(self) -> list[str]:
        return [name for name in self.names if name.lower().endswith(IMAGE_SUFFIXES)]


@dataclass(frozen=True, kw_only=True)
class Files:
    """Encoded pictures by index; `read` and `name` may be called from several threads."""

    count: int
    read: Callable[[int], bytes | Image.Image]
    name: Callable[[int], str]
    labels: np.ndarray | None = None
    """int64 [count], -1 where the class is not known; None if it is known of none."""
    class_names: tuple[str, ...] = ()
    jpeg: bool = False
    """Whether any name ends as JPEG files do."""
    facts: dict[str, Any] = field(default_factory=dict)


def folder_tree(folder: Path) -> Tree:
    """The files of a folder and all its subfolders.

    Raises:
        ValueError: a subfolder that cannot be read, or a link that leads back to a folder around it.
    """
    names = []
    for base, folders, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(base).relative_to(folder)
        for name in folders:
            _refuse_loop(Path(base) / name, depth=len(inside.parts) + 1)
        names += [(inside / name).as_posix() for name in files if not name.startswith(".")]
    return Tree(str(folder), sorted(names), lambda name: (folder / name).read_bytes())


def _unreadable(error: OSError) -> None:
    raise ValueError(
        f"{error.filename}: a folder that cannot be read ({error.strerror}); correct its rights"
    ) from error


def _refuse_loop(folder: Path, *, depth: int) -> None:
    """Raise ValueError if a folder is a link to one of the `depth` folders around it: there would be no end."""
    if folder.is_symlink() and any(folder.samefile(above) for above in folder.parents[:depth]):
        raise ValueError(f"{folder}: a link back to a folder around it; remove it")


def zip_tree(path: Path) -> Tree:
    """The files of a zip; nothing is unpacked to the disk.

    Raises:
        ValueError: as `list_members`.
    """
    members = {PurePosixPath(member.name.replace("\\", "/")).as_posix(): member for member in list_members(path)}
    hidden = {name for name in members if any(part.startswith((".", "__MACOSX")) for part in name.split("/"))}
    return Tree(str(path), sorted(members.keys() - hidden), lambda name: read_member(path, members[name]))


def list_tree(tree: Tree) -> Files:
    """The images of a tree in the order of their names, with labels as far as the tree has them.

    `samples.json` (ours) or `dataset.json` (EDM's) say them, else the uppermost folders are classes. Folders around
    the whole set, as zips often have, do not count.

    Raises:
        ValueError: no image, several sets, images beside class folders, or labels that do not fit.
    """
    _refuse_several(tree)
    images = tree.images()
    if not images:
        endings = " ".join(IMAGE_SUFFIXES)
        raise ValueError(
            f"{tree.title}: no image in it (known: {endings}); a .zip, .npz or .parquet in it goes by name"
        )
    if (told := _sidecar(tree, "samples.json")) is not None and _is_ours(told):
        return _own_samples(tree, told)
    if (told := _sidecar(tree, "dataset.json")) is not None and "labels" in told:
        return _files(tree, images, *_edm_labels(tree, images, told["labels"]))
    tops = {name.partition("/")[0] if "/" in name else "" for name in images}
    if len(tops) == 1 and "" not in tops:
        return list_tree(tree.below(tops.pop()))
    return _files(tree, images, *_class_folders(tree, images, sorted(tops)))


def _files(tree: Tree, names: Sequence[str], labels: np.ndarray | None, class_names: tuple[str, ...]) -> Files:
    return Files(
        count=len(names),
        read=lambda index: tree.read(names[index]),
        name=lambda index: f"{tree.title}/{names[index]}",
        labels=labels,
        class_names=class_names,
        jpeg=any(name.lower().endswith((".jpg", ".jpeg")) for name in names),
    )


def _refuse_several(tree: Tree) -> None:
    """Raise ValueError if there are several sets of samples, or a training and a held-out split."""
    sets = [PurePosixPath(name).parent for name in tree.names if name.endswith("/samples.json")]
    splits = {name.partition("/")[0] for name in tree.images() if "/" in name}
    if len(sets) > 1:
        kind = "several sets of samples"
    elif choose_split(splits, "train"):
        kind, sets = "both a training and a held-out split", [PurePosixPath(name) for name in sorted(splits)]
    else:
        return
    raise ValueError(f"{tree.title}: {kind}; give one of {', '.join(f'{tree.title}/{each}' for each in sets[:10])}")


def _sidecar(tree: Tree, name: str) -> dict[str, Any] | None:
    """A JSON object beside the images; None if there is none."""
    if name not in tree.names:
        return None
    try:
        told = json.loads(tree.read(name))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{tree.title}/{name}: cannot be read ({error}); write it again, or remove it") from error
    return told if isinstance(told, dict) else None


def _is_ours(told: dict[str, Any]) -> bool:
    return all(isinstance(told.get(key), kind) for key, kind in KINDS.items())


def _own_samples(tree: Tree, told: dict[str, Any]) -> Files:
    """000000.png ... as many as samples.json tells of, and what it tells of them all."""
    asked, where = told["labels"], f"{tree.title}/samples.json"
    names, there = [png_path(Path(), row).name for row in range(len(asked))], set(tree.names)
    missing = next((name for name in names if name not in there), None)
    if missing or not names or len(told["seeds"]) != len(asked):
        fault = f"{missing} is missing" if missing else f"{len(asked)} labels, {len(told['seeds'])} seeds"
        raise ValueError(f"{where} does not fit its folder: {fault}; sample again")
    labels, class_names = _integers(asked, where), tuple(map(str, told.get("class_names") or ()))
    # What is told of every single image is too long for a protocol.
    kept = {key: value for key, value in told.items() if not isinstance(value, list)}
    facts = {"samples": {**kept, "seeds": [told["seeds"][0], told["seeds"][-1]]}}
    return replace(_files(tree, names, labels if labels.max() >= 0 else None, class_names), facts=facts)


def _edm_labels(tree: Tree, images: Sequence[str], told: Any) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels of `{"labels": [[name, class], ...]}`, or of `{"labels": null}` (Karras et al. 2024, code)."""
    where = f"{tree.title}/dataset.json"
    if not told:
        return None, ()
    if not isinstance(told, list) or any(not isinstance(row, list) or len(row) != 2 for row in told):
        raise ValueError(f"{where}: labels must be a list of [name, class]; correct it, or set it to null")
    classes = _integers([row[1] for row in told], where)
    known = {str(row[0]).replace("\\", "/"): label for row, label in zip(told, classes, strict=True)}
    unknown = next((name for name in images if name not in known), None)
    if unknown is not None:
        raise ValueError(f"{where}: no label for {unknown}; add it, or set labels to null")
    labels = np.array([known[name] for name in images], np.int64)
    return labels, label_names(labels.tolist())


def _class_folders(tree: Tree, images: Sequence[str], tops: list[str]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels by the uppermost folder; none if there is no folder, or if folders are numbered shards."""
    if tops == [""]:
        return None, ()
    if "" in tops:
        loose = next(name for name in images if "/" not in name)
        raise ValueError(f"{tree.title}: {loose} lies beside folders of images such as {tops[1]}; move it away")
    if all(top.isdecimal() and len(top) >= SHARD_DIGITS for top in tops):
        return None, ()
    found = [name.partition("/")[0] for name in images]
    return encode_labels(found, tuple(tops), tree.title), tuple(tops)


def _integers(values: Sequence[Any], where: str) -> np.ndarray:
    """int64 [N]; negative numbers mean that the class is not known.

    Raises:
        ValueError: something else than integers.
    """
    wrong = next((value for value in values if type(value) is not int or abs(value) >= 1 << 63), None)
    if wrong is not None:
        raise ValueError(f"{where}: label {wrong!r} is no integer of 64 bits; correct it, or remove the file")
    return np.maximum(np.array(values, np.int64), -1)
