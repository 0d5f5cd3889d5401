"""Images in a column of a table: parquet files in the Hugging Face layout, and data sets of the `datasets` library."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.config import DataConfig
from engine.images import Listing
from engine.splits import (
    SPLIT_NAMES,
    choose_split,
    digest,
    encode_labels,
    held_out,
    label_names,
    required_path,
    split_files,
)

ROW_GROUP_BYTES = 1 << 30
IMAGE_NAMES = ("image", "img", "jpg", "png", "picture")
LABEL_NAMES = ("label", "labels", "class", "target", "y")


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what; class names as far as the table's header gives them."""

    image: str
    label: str | None
    caption: str | None
    class_names: tuple[str, ...]

    @property
    def facts(self) -> list[str]:
        return [name for name in (self.label, self.caption) if name is not None]


def choose_columns(config: DataConfig, schema: pa.Schema, features: dict[str, Any]) -> Columns:
    """The keys of `config` where set; else Hugging Face's features, then customary names.

    Raises:
        ValueError: a column is not there, or cannot be told by itself.
    """
    for key in ("image_column", "label_column", "caption_column"):
        value = getattr(config, key)
        if value is not None and value not in schema.names:
            raise ValueError(f"data.{key}={value}: no such column; there are {', '.join(schema.names)}")
    image = config.image_column or _only(schema, "image", _of_type(features, "Image"), IMAGE_NAMES)
    if image is None:
        raise ValueError(f"data.image_column is not set and no image column stands out of {', '.join(schema.names)}; set it")
    label = config.label_column or _only(schema, "label", _of_type(features, "ClassLabel"), LABEL_NAMES)
    names = tuple(features.get(label or "", {}).get("names") or ())
    return Columns(image, label, config.caption_column, names)


def _of_type(features: dict[str, Any], kind: str) -> list[str]:
    return [name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == kind]


def _only(schema: pa.Schema, role: str, typed: list[str], customary: tuple[str, ...]) -> str | None:
    """The one column of the right type, or the first customary name; several typed ones need a choice."""
    named = next((name for name in customary if name in (typed or schema.names)), None)
    if named is None and len(typed) > 1:
        raise ValueError(f"data.{role}_column is not set and {', '.join(typed)} all hold a {role}; choose one")
    return named or next(iter(typed), None)


def list_parquet(config: DataConfig, split: str) -> Listing:
    """Parquet files with an image column of struct<bytes, path> or of bytes; read by row group when first touched."""
    parts = split_files(config, ".parquet")
    files = parts.get(split) or parts["all"]
    train_files = parts.get("train") or parts["all"]
    schema = _opened(train_files[0]).schema_arrow
    header = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    columns = choose_columns(config, schema, header.get("info", {}).get("features", {}))
    train_facts = None if files == train_files else _facts(train_files, columns)
    rows = RowGroups(files, columns.image)
    listing = _listing(columns, _facts(files, columns), train_facts, len(rows), rows, digest(*rows.sizes))
    return listing.subset(held_out(listing.labels, config.test_fraction, split)) if "all" in parts else listing


def _listing(
    columns: Columns, facts: pa.Table, train_facts: pa.Table | None, number: int, rows: Any, sizes: str
) -> Listing:
    """`rows[index]` is the cell of the image column and rows.title(index) its name in messages."""
    labels, names = np.full(number, -1), columns.class_names
    if columns.label is not None:
        values = facts.column(columns.label).to_pylist()
        # Names that the table does not give are those of the training split, so that both splits agree.
        names = names or label_names(values if train_facts is None else train_facts.column(columns.label).to_pylist())
        labels = encode_labels(values, names, f"column {columns.label}")
    captions = None
    if columns.caption is not None:
        captions = facts.column(columns.caption).to_pylist()
        if not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"data.caption_column={columns.caption}: not every row holds one string; choose another column")
    return Listing(
        labels=labels,
        class_names=names,
        captions=captions,
        read=lambda index: _encoded(rows[index], rows.folder),
        name=rows.title,
        digest=digest(sizes, labels),
    )


def _encoded(cell: Any, folder: Path) -> bytes:
    """The encoded image of a cell: bytes, {"bytes": ...}, or {"path": ...} beside the table."""
    if isinstance(cell, dict):
        if cell.get("bytes") is None and cell.get("path"):
            return (folder / cell["path"]).read_bytes()
        cell = cell.get("bytes")
    if not isinstance(cell, bytes):
        raise ValueError(f"the row holds {type(cell).__name__}, not an encoded image")
    return cell


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file ({error}); fetch it again") from error


def _facts(files: list[Path], columns: Columns) -> pa.Table:
    """Labels and captions of all files; the images stay on disk."""
    tables = []
    for path in files:
        opened = _opened(path)
        missing = [name for name in (columns.image, *columns.facts) if name not in opened.schema_arrow.names]
        if missing:
            raise ValueError(f"{path}: no column {missing[0]}, which the first training file has; remove this file")
        # A schema carries the file's own metadata, which would keep equal tables from being joined.
        tables.append(opened.read(columns=columns.facts).replace_schema_metadata(None))
    return pa.concat_tables(tables, promote_options="permissive")


class RowGroups:
    """The image column of several parquet files, by row. The latest row groups stay in memory, up to about 1 GiB."""

    def __init__(self, files: list[Path], column: str) -> None:
        self.folder, self._column = files[0].parent, column
        metadata = [(path, _opened(path).metadata) for path in files]
        self._groups = [(path, group) for path, facts in metadata for group in range(facts.num_row_groups)]
        counts = [facts.row_group(group).num_rows for _, facts in metadata for group in range(facts.num_row_groups)]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self.sizes = [f"{path.name} {path.stat().st_size} {facts.num_rows}" for path, facts in metadata]
        self._kept: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Any:
        group, row = self._locate(index)
        with self._lock:
            cells = self._kept.get(group)
            if cells is None:
                path, number = self._groups[group]
                cells = _opened(path).read_row_group(number, columns=[self._column]).column(0)
                self._kept[group] = cells
                self._forget()
            self._kept.move_to_end(group)
        return cells[row].as_py()

    def title(self, index: int) -> str:
        group, row = self._locate(index)
        path, number = self._groups[group]
        return f"{path} row group {number} row {row}"

    def _locate(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - (int(self._ends[group - 1]) if group else 0)

    def _forget(self) -> None:
        while len(self._kept) > 1 and sum(cells.nbytes for cells in self._kept.values()) > ROW_GROUP_BYTES:
            self._kept.popitem(last=False)


def list_hub(config: DataConfig, split: str) -> Listing:
    """A data set of the `datasets` library: a hub name, a folder that load_dataset understands, or one saved to disk."""
    path = required_path(config)
    whole = _load_hub(path, config.name, "data.path")
    tests = _load_hub(config.test_path, config.name, "data.test_path") if config.test_path else {}
    train_name = choose_split(whole, "train") or next((name for name in SPLIT_NAMES["train"] if name in whole), None)
    train_name = train_name or (next(iter(whole)) if len(whole) == 1 else None)
    if train_name is None:
        raise ValueError(f"data.path={path}: no train split among {', '.join(whole)}; point to a part that has one")
    test_name = next((name for name in (*SPLIT_NAMES["test"], *tests) if name in (tests or whole)), None)
    train, test = whole[train_name], (tests or whole).get(test_name or "")
    chosen = train if split == "train" or test is None else test
    columns = choose_columns(config, train.features.arrow_schema, train.features.to_dict())
    train_facts = None if chosen is train else _hub_facts(train, columns)
    rows = HubRows(chosen, columns.image, Path(path))
    listing = _listing(columns, _hub_facts(chosen, columns), train_facts, len(chosen), rows, rows.sizes)
    return listing.subset(held_out(listing.labels, config.test_fraction, split)) if test is None else listing


def _load_hub(path: str, name: str | None, key: str) -> dict[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError("data.source=hf needs the datasets library: pip install 'tokenloom[hub]'") from error
    saved = any((Path(path) / mark).is_file() for mark in ("dataset_dict.json", "state.json"))
    try:
        loaded = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, name)
    except (ValueError, OSError) as error:
        raise ValueError(f"{key}={path}: {error}; give a hub name that can be reached, or a local copy") from error
    return {"all": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)


def _hub_facts(dataset: Any, columns: Columns) -> pa.Table:
    return dataset.select_columns(columns.facts).with_format("arrow")[:]


class HubRows:
    """The image column of a data set, undecoded, by row."""

    def __init__(self, dataset: Any, column: str, folder: Path) -> None:
        import datasets

        if column not in dataset.column_names:
            raise ValueError(f"data.test_path: no column {column}, which the training split has")
        if isinstance(dataset.features[column], datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self._cells = dataset.select_columns([column])
        self._column, self.folder = column, folder
        samples = np.linspace(0, len(dataset) - 1, num=min(64, len(dataset)), dtype=np.int64)
        self.sizes = digest(*(_encoded(self[int(index)], folder) for index in samples))

    def __getitem__(self, index: int) -> Any:
        return self._cells[index][self._column]

    def title(self, index: int) -> str:
        return f"row {index}"
