"""Data sets of the `datasets` library (extra: hub)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engine.config import DataConfig
from engine.images import Listing
from engine.splits import SPLIT_NAMES, choose_split, digest, held_out, required_path
from engine.tables import Columns, choose_columns, list_rows


def list_hub(config: DataConfig, split: str) -> Listing:
    """A data set by its hub name, a folder that load_dataset understands, or one written by save_to_disk."""
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
    listing = list_rows(columns, _hub_facts(chosen, columns), train_facts, rows)
    return listing.subset(held_out(listing.labels, config.test_fraction, split)) if test is None else listing


def _load_hub(path: str, name: str | None, key: str) -> dict[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError("data.source=hf needs the datasets library: pip install 'tokenloom[hub]'") from error
    saved = any((Path(path) / mark).is_file() for mark in ("dataset_dict.json", "state.json"))
    try:
        loaded = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, name)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
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
        self.content = digest(str(len(dataset)), *(str(self[int(index)]) for index in samples))

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, index: int) -> Any:
        return self._cells[index][self._column]

    def title(self, index: int) -> str:
        return f"row {index}"
