"""Parquet files: columns, lazy row groups, splits and messages."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.sources import open_images
from engine.tables import RowGroups

sys.path.insert(0, str(Path(__file__).parent))
from pictures import both, config, grey, levels

CLASS_LABEL = {"img": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}


def make_parquet(path, rows: list[int], features=CLASS_LABEL, **columns):
    table = pa.table({"img": [{"bytes": grey(level), "path": None} for level in rows], **columns})
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)


def test_parquet_in_the_hugging_face_layout(tmp_path):
    make_parquet(tmp_path / "train-00000-of-00002.parquet", [1, 2, 3], label=[0, 1, 0])
    make_parquet(tmp_path / "train-00001-of-00002.parquet", [4], label=[1])
    make_parquet(tmp_path / "test.parquet", [5], label=[None])
    train, test = (open_images(config("parquet", tmp_path), split) for split in ("train", "test"))
    assert (
        train.class_names == ("cat", "dog") and train.labels.tolist() == [0, 1, 0, 1] and test.labels.tolist() == [-1]
    )
    assert (levels(train), levels(test)) == ([1, 2, 3, 4], [5])
    assert train.load(np.array([3, 0]))["images"][:, 0, 0, 0].tolist() == [4, 1]


def test_parquet_by_glob_with_a_held_out_fraction(tmp_path):
    make_parquet(tmp_path / "x" / "0.parquet", [1, 2, 3], label=[0, 0, 1])
    make_parquet(tmp_path / "x" / "1.parquet", [4, 5, 6], label=[0, 1, 1])
    train, test = both(config("parquet", tmp_path / "x" / "*.parquet", test_fraction=0.34))
    assert sorted(train + test) == [1, 2, 3, 4, 5, 6] and len(test) == 2


def test_parquet_with_plain_columns_and_captions(tmp_path):
    pictures = pa.table(
        {"photo": [grey(1), grey(2)], "kind": ["b", "a"], "text": ["one", "two"], "texts": [["1", "one"], ["2"]]}
    )
    pq.write_table(pictures, tmp_path / "t.parquet")
    columns = {"image_column": "photo", "label_column": "kind", "caption_column": "text"}
    images = open_images(config("parquet", tmp_path / "t.parquet", test_fraction=0.0, **columns), "train")
    assert images.class_names == ("a", "b") and images.labels.tolist() == [1, 0] and images.captions == ["one", "two"]
    assert levels(images) == [1, 2]
    columns["caption_column"] = "texts"
    several = open_images(config("parquet", tmp_path / "t.parquet", test_fraction=0.0, **columns), "train")
    assert several.captions == ["1\none", "2"]


def test_parquet_test_labels_use_the_training_classes(tmp_path):
    for name, rows, kinds in (("train", [1, 2, 3], ["a", "b", "c"]), ("test", [4], ["c"])):
        make_parquet(tmp_path / f"{name}.parquet", rows, features=None, label=kinds)
    test = open_images(config("parquet", tmp_path), "test")
    assert test.labels.tolist() == [2] and test.class_names == ("a", "b", "c")


def test_parquet_reads_an_image_by_path_beside_the_file(tmp_path):
    (tmp_path / "a.png").write_bytes(grey(77))
    cells = pa.array([{"bytes": None, "path": "a.png"}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": cells}), tmp_path / "t.parquet")
    images = open_images(config("parquet", tmp_path / "t.parquet", test_fraction=0.0), "train")
    assert levels(images) == [77] and images.class_names == () and images.labels.tolist() == [-1]


def test_parquet_keeps_few_row_groups(tmp_path, monkeypatch):
    make_parquet(tmp_path / "t.parquet", list(range(9)), label=[0] * 9)
    monkeypatch.setattr("engine.tables.ROW_GROUP_BYTES", 1)
    rows = RowGroups([tmp_path / "t.parquet"], "img")
    order = [8, 0, 7, 1, 6, 2, 5, 3, 4]
    assert [rows[index]["bytes"] for index in order] == [grey(index) for index in order]
    assert len(rows._kept) == 1 and rows.title(8).endswith("row group 4 row 0")


def test_parquet_faults_are_named(tmp_path):
    def fails(message, **keys):
        with pytest.raises(ValueError, match=message):
            open_images(config("parquet", tmp_path / "t.parquet", **keys), "train")

    fails("data.path=.*t.parquet: no .parquet file there")
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    fails("t.parquet: not a whole parquet file")
    make_parquet(tmp_path / "t.parquet", [1, 2], features=None, label=[0, 1], other=[1.5, 2.5])
    fails("data.image_column=nothing: no such column; there are img, label, other", image_column="nothing")
    fails("column other: label 1.5 is neither", label_column="other")
    fails("data.caption_column=other: not every row holds a string", caption_column="other")
    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "t.parquet")
    fails("data.image_column is not set and none of a, b is surely it")
    twice = {"fine": {"_type": "ClassLabel", "names": ["x"]}, "coarse": {"_type": "ClassLabel", "names": ["y"]}}
    make_parquet(tmp_path / "t.parquet", [1], features={"img": {"_type": "Image"}, **twice}, fine=[0], coarse=[0])
    fails("data.label_column is not set and fine, coarse all hold a label; choose one")


def test_files_with_unlike_columns_are_refused(tmp_path):
    make_parquet(tmp_path / "0.parquet", [1], label=[0])
    make_parquet(tmp_path / "1.parquet", [1], kind=[0])
    with pytest.raises(ValueError, match=r"1.parquet: no column label"):
        open_images(config("parquet", tmp_path), "train")
