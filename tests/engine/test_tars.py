"""WebDataset shards: members, labels, splits and messages."""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.sources import open_images

sys.path.insert(0, str(Path(__file__).parent))
from pictures import both, config, grey, levels


def make_tar(path, samples: dict[str, dict[str, bytes]]):
    with tarfile.open(path, "w") as archive:
        for key, members in samples.items():
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def sample(level: int, label: int) -> dict[str, bytes]:
    return {"png": grey(level), "cls": str(label).encode(), "txt": f"level {level}".encode()}


def test_tar_shards_are_read_at_random(tmp_path):
    make_tar(tmp_path / "train-000.tar", {"a/0": sample(1, 0), "a/1": sample(2, 2)})
    make_tar(tmp_path / "train-001.tar", {"a/0": sample(3, 1)})
    make_tar(tmp_path / "test-000.tar", {"0": sample(4, 1)})
    train, test = (
        open_images(config("webdataset", tmp_path, caption_column="txt"), split) for split in ("train", "test")
    )
    assert train.load(np.array([2, 0, 1]))["images"][:, 0, 0, 0].tolist() == [3, 1, 2]
    assert train.labels.tolist() == [0, 2, 1] and train.class_names == test.class_names == ("0", "1", "2")
    assert train.captions == ["level 1", "level 2", "level 3"] and levels(test) == [4]


def test_tar_labels_from_json_fields(tmp_path):
    rows = {
        "0": {"jpg": grey(1), "json": b'{"kind": "owl", "label": 3}'},
        "1": {"jpg": grey(2), "json": b'{"kind": "emu", "label": 0}'},
    }
    path = make_tar(tmp_path / "x.tar", rows)
    named = open_images(config("webdataset", path, label_column="kind", test_fraction=0.0), "train")
    assert named.class_names == ("emu", "owl") and named.labels.tolist() == [1, 0]
    assert open_images(config("webdataset", path, test_fraction=0.0), "train").labels.tolist() == [3, 0]


def test_captions_of_tars_are_texts_or_lists_of_them(tmp_path):
    def told(*captions) -> list[str] | None:
        samples = {
            str(n): {"png": grey(n), "json": json.dumps({"text": text}).encode()} for n, text in enumerate(captions)
        }
        make_tar(tmp_path / "train.tar", samples)
        settings = config("webdataset", tmp_path / "train.tar", caption_column="text", test_fraction=0.0)
        return open_images(settings, "train").captions

    assert told("a cat", ["one", "two"], 7) == ["a cat", "one\ntwo", "7"]
    for wrong in (None, {"en": "a cat"}, ["a cat", None]):
        with pytest.raises(ValueError, match=r"data\.caption_column=text: not every row holds a string"):
            told("a cat", wrong)


def test_tar_range_with_a_held_out_fraction(tmp_path):
    for shard in range(3):
        make_tar(tmp_path / f"s{shard:02d}.tar", {f"{i}": sample(10 * shard + i, 0) for i in range(4)})
    train, test = both(config("webdataset", tmp_path / "s{00..01}.tar", test_fraction=0.25))
    assert sorted(train + test) == [0, 1, 2, 3, 10, 11, 12, 13] and len(test) == 2


def test_tars_of_the_webdataset_library_are_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for level in range(4):
            writer.write({"__key__": f"{level:04d}", "png": Image.new("RGB", (8, 8), (level,) * 3), "cls": level % 2})
    images = open_images(config("webdataset", tmp_path / "x.tar", test_fraction=0.0), "train")
    assert levels(images) == [0, 1, 2, 3] and images.labels.tolist() == [0, 1, 0, 1]


def test_tar_faults_are_named(tmp_path):
    def fails(message, **keys):
        with pytest.raises(ValueError, match=message):
            open_images(config("webdataset", tmp_path / "x.tar", **keys), "train")

    fails("data.path=.*x.tar: no .tar file there")
    path = make_tar(tmp_path / "x.tar", {"0": sample(1, 0)})
    fails(
        "data.label_column=kind: neither a member nor a json field of sample 0; there are cls, png, txt",
        label_column="kind",
    )
    fails("no sample has an image; members end in cls, png, txt; set data.image_column", image_column="webp")
    whole = path.read_bytes()
    path.write_bytes(whole[:560])
    fails("x.tar: (cut after|not a whole)")
    path.write_bytes(b"\x1f\x8b" + whole)
    fails("x.tar: not a whole, uncompressed tar")
    make_tar(path, {"0": sample(1, 0), "1": {"png": grey(1)}})
    fails("1 has no cls, which the first sample has")
