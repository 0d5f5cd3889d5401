"""WebDataset shards: tar files whose members share a key, such as 0007.jpg + 0007.cls; indexed once, read at random."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.config import DataConfig
from engine.images import Listing
from engine.splits import IMAGE_SUFFIXES, caption_texts, digest, encode_labels, held_out, label_names, split_files


class Member(NamedTuple):
    """Where the bytes of a file lie inside a shard."""

    shard: int
    offset: int
    size: int


class Sample(NamedTuple):
    key: str
    members: dict[str, Member]  # by suffix: {"jpg": ..., "cls": ...}
    image: str  # suffix of the image


def list_webdataset(config: DataConfig, split: str) -> Listing:
    """Uncompressed tar shards: a file, a folder, a glob, or a numbered range such as `train-{0000..0015}.tar`.

    The label is the member `cls` (a number or a class name) or the field `label` of the member `json`;
    data.label_column and data.caption_column name another member (`txt`) or another field of `json`.
    """
    parts = split_files(config, ".tar")
    shards = parts.get(split) or parts["all"]
    train_shards = parts.get("train") or parts["all"]
    samples = index_shards(shards, config.image_column)
    values = _values(shards, samples, config.label_column, "label_column", ("cls", "label"))
    train_values = values
    if values is not None and shards != train_shards:
        trained = index_shards(train_shards, config.image_column)
        train_values = _values(train_shards, trained, config.label_column, "label_column", ("cls", "label"))
    names = label_names(train_values) if train_values is not None else ()
    labels = encode_labels(values, names, "labels of the shards") if values is not None else np.full(len(samples), -1)
    listing = _listing(config, shards, samples, labels, names)
    return listing.subset(held_out(labels, config.test_fraction, split)) if "all" in parts else listing


def _listing(
    config: DataConfig, shards: list[Path], samples: list[Sample], labels: np.ndarray, names: tuple[str, ...]
) -> Listing:
    keys = np.array([sample.key.encode() for sample in samples], dtype=np.bytes_)
    # Arrays instead of a list of samples: [N, 3] shard, offset, size.
    places = np.array([sample.members[sample.image] for sample in samples], np.int64).reshape(len(samples), 3)
    captions = None
    if config.caption_column:
        values = _values(shards, samples, config.caption_column, "caption_column", ()) or []
        words = [str(value) if isinstance(value, int) else value for value in values]  # a text of digits is a number
        captions = caption_texts(words, config.caption_column)

    def read(index: int) -> bytes:
        shard, offset, size = places[index].tolist()
        return read_member(shards, Member(shard, offset, size))

    return Listing(
        labels=labels,
        class_names=names,
        captions=captions,
        read=read,
        name=lambda index: f"{shards[places[index, 0]]} member {keys[index].decode()}",
        digest=digest(labels, keys, places, *(f"{path.name} {path.stat().st_size}" for path in shards)),
    )


def index_shards(shards: list[Path], image_suffix: str | None) -> list[Sample]:
    """Every sample that has an image, in shard order.

    Raises:
        ValueError: a shard is cut or compressed, or no sample has an image.
    """
    wanted = (f".{image_suffix.lstrip('.')}",) if image_suffix else IMAGE_SUFFIXES
    samples: list[Sample] = []
    seen: set[str] = set()
    for shard, path in enumerate(shards):
        for key, members in _index_one(shard, path).items():
            seen.update(members)
            image = next((suffix for suffix in members if f".{suffix}".lower().endswith(wanted)), None)
            if image is not None:
                samples.append(Sample(key, members, image))
    if not samples:
        endings = ", ".join(sorted(seen)) or "nothing"
        raise ValueError(f"{shards[0]}: no sample has an image; members end in {endings}; set data.image_column")
    return samples


def _index_one(shard: int, path: Path) -> dict[str, dict[str, Member]]:
    """Members of one tar by key; the key ends at the first dot of the file name, as WebDataset has it."""
    found: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                folder, _, file_name = info.name.rpartition("/")
                stem, _, suffix = file_name.partition(".")
                if info.isfile() and stem and suffix:
                    members = found.setdefault(f"{folder}/{stem}" if folder else stem, {})
                    members[suffix] = Member(shard, info.offset_data, info.size)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a whole, uncompressed tar ({error}); fetch it again or decompress it") from error
    end = max((member.offset + member.size for members in found.values() for member in members.values()), default=0)
    if end > path.stat().st_size:
        raise ValueError(f"{path}: cut after {path.stat().st_size} bytes, its members end at {end}; fetch it again")
    return found


def read_member(shards: list[Path], member: Member) -> bytes:
    # A file handle per read needs no lock between threads.
    with shards[member.shard].open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _values(
    shards: list[Path], samples: list[Sample], column: str | None, key: str, customary: Iterable[str]
) -> list[Any] | None:
    """One value per sample: the text of the member `column`, else that field of json; None if there is neither."""
    first = samples[0].members  # the first sample decides what the shards hold
    fields = json.loads(read_member(shards, first["json"])) if "json" in first else {}
    name = column or next((name for name in customary if name in first or name in fields), None)
    if name is None:
        return None
    if name not in first and name not in fields:
        there = sorted({*first, *fields})
        fault = f"neither a member nor a json field of sample {samples[0].key}"
        raise ValueError(f"data.{key}={name}: {fault}; there are {', '.join(there)}")
    return [_value(shards, sample, name, from_member=name in first) for sample in samples]


def _value(shards: list[Path], sample: Sample, name: str, *, from_member: bool) -> Any:
    member = sample.members.get(name if from_member else "json")
    fault = f"{sample.key} has no {name}, which the first sample has; complete or remove it"
    if member is None:
        raise ValueError(fault)
    text = read_member(shards, member).decode().strip()
    if not from_member:
        fields = json.loads(text)
        if name not in fields:
            raise ValueError(fault)
        return fields[name]
    return int(text) if re.fullmatch("-?[0-9]+", text) else text
