"""Images in a column of a table; parquet files in the Hugging Face layout, read by row group."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.config import DataConfig
from engine.images import Listing
from engine.splits import caption_texts, digest, encode_labels, held_out, label_names, split_files

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


class Rows(Protocol):
    """The image column of a table, undecoded."""

    folder: Path
    """Where relative paths in the column start."""
    content: str
    """A digest of the images, or of what tells that they changed."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...
    def title(self, index: int) -> str: ...


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
        raise ValueError(f"data.image_column is not set and none of {', '.join(schema.names)} is surely it; set it")
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
    listing = list_rows(columns, _facts(files, columns), train_facts, rows)
    return listing.subset(held_out(listing.labels, config.test_fraction, split)) if "all" in parts else listing


def list_rows(columns: Columns, facts: pa.Table, train_facts: pa.Table | None, rows: Rows) -> Listing:
    """The listing of a table from its labels and captions; `train_facts` where the training split is another table."""
    labels, names = np.full(len(rows), -1), columns.class_names
    if columns.label is not None:
        values = facts.column(columns.label).to_pylist()
        # Names that the table does not give are those of the training split, so that both splits agree.
        names = names or label_names(values if train_facts is None else train_facts.column(columns.label).to_pylist())
        labels = encode_labels(values, names, f"column {columns.label}")
    captions = None
    if columns.caption is not None:
        captions = caption_texts(facts.column(columns.caption).to_pylist(), columns.caption)
    return Listing(
        labels=labels,
        class_names=names,
        captions=captions,
        read=lambda index: encoded(rows[index], rows.folder),
        name=rows.title,
        digest=digest(rows.content, labels),
    )


def encoded(cell: Any, folder: Path) -> bytes:
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
        self.content = digest(*(f"{path.name} {path.stat().st_size} {facts.num_rows}" for path, facts in metadata))
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
