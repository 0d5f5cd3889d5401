"""The sources whose images are files or arrays: splits, labels and messages."""

import struct
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config import DataConfig
from engine.sources import SOURCES, open_images
from engine.splits import held_out

sys.path.insert(0, str(Path(__file__).parent))
from pictures import both, config, grey, levels, make_folder


def test_every_source_of_the_config_is_there():
    assert set(typing.get_args(typing.get_type_hints(DataConfig)["source"])) == set(SOURCES)


def test_digits_are_divided_for_good():
    train, test = (open_images(config("digits", size=32), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1438, 359) and train.class_names == tuple("0123456789")
    assert np.bincount(test.labels).min() >= 34
    again = open_images(config("digits", size=32, test_fraction=0.5), "train")
    assert again.identity()["digest"] == train.identity()["digest"] != test.identity()["digest"]


def test_digits_keep_their_grey_levels_and_grow_smoothly():
    from sklearn.datasets import load_digits

    listing = SOURCES["digits"](config("digits"), "test")
    first = int(held_out(load_digits().target, 0.2, "test")[0])
    small = open_images(config("digits"), "test").load(np.array([0]))["images"][0, 0]
    assert np.array_equal(small, np.round(load_digits().images[first] * 255 / 16)) and listing.labels.dtype == np.int64
    large = open_images(config("digits", size=64), "test").load(np.array([0]))["images"][0, 0].float()
    assert (
        large.diff(dim=0).abs().max() < 80 and len(large.unique()) > 100
    )  # blocks would have 17 levels and jumps of 255


def test_class_folders_give_labels(tmp_path):
    make_folder(tmp_path, {"dog": [10, 11], "cat/deep": [20, 21]})
    (tmp_path / "empty").mkdir()
    (tmp_path / ".hidden.png").write_bytes(b"")
    images = open_images(config("folder", tmp_path, test_fraction=0.0), "train")
    assert images.class_names == ("cat", "dog") and images.labels.tolist() == [0, 0, 1, 1]
    assert levels(images) == [20, 21, 10, 11]


def test_a_flat_folder_has_no_labels(tmp_path):
    make_folder(tmp_path, {".": list(range(10))})
    train, test = (open_images(config("folder", tmp_path), split) for split in ("train", "test"))
    assert train.class_names == () and set(train.labels) == {-1}
    assert sorted(levels(train) + levels(test)) == list(range(10)) and len(test) == 1


@pytest.mark.parametrize("name", ["test", "val"])
def test_split_folders_are_used(tmp_path, name):
    make_folder(tmp_path, {"train/a": [1], "train/b": [2, 3], f"{name}/b": [4]})
    assert both(config("folder", tmp_path)) == ([1, 2, 3], [4])
    assert open_images(config("folder", tmp_path), "test").labels.tolist() == [1]


def test_test_path_is_the_held_out_part(tmp_path):
    make_folder(tmp_path, {"one/a": [1], "one/b": [2], "two/b": [3]})
    assert both(config("folder", tmp_path / "one", test_path=str(tmp_path / "two"))) == ([1, 2], [3])


def test_a_lone_train_folder_is_no_class(tmp_path):
    make_folder(tmp_path, {"train/a": [1, 2], "train/b": [3, 4]})
    settings = config("folder", tmp_path, test_fraction=0.5)
    train, test = both(settings)
    assert open_images(settings, "train").class_names == ("a", "b") and sorted([*train, *test]) == [1, 2, 3, 4]


def test_text_files_beside_images_are_captions(tmp_path):
    make_folder(tmp_path, {".": [1, 2]})
    (tmp_path / "001.txt").write_text("one\n")
    settings = config("folder", tmp_path, caption_column="txt", test_fraction=0.0)
    with pytest.raises(ValueError, match=r"002\.txt is missing"):
        open_images(settings, "train")
    (tmp_path / "002.txt").write_bytes("\ufeffd\u00f6s\ntwo".encode())
    assert open_images(settings, "train").captions == ["one", "d\u00f6s\ntwo"]
    (tmp_path / "002.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"002\.txt is no UTF-8 text"):
        open_images(settings, "train")


def test_a_changed_file_changes_the_identity(tmp_path):
    make_folder(tmp_path, {"a": [1, 2], "b": [3]})
    settings = config("folder", tmp_path, test_fraction=0.0)
    before = open_images(settings, "train").identity()
    assert open_images(settings, "train").identity() == before
    (tmp_path / "a" / "001.png").write_bytes(grey(1) + b" ")
    changed = open_images(settings, "train").identity()
    (tmp_path / "b" / "003.png").rename(tmp_path / "a" / "003.png")
    moved = open_images(settings, "train").identity()
    assert len({facts["digest"] for facts in (before, changed, moved)}) == 3


def test_folder_faults_are_named(tmp_path):
    def fails(message, path=tmp_path, **keys):
        with pytest.raises(ValueError, match=message):
            open_images(config("folder", path, **keys), keys.pop("split", "train"))

    fails("data.path is not set", path=None)
    fails("data.path=.*nowhere: no such folder", path=tmp_path / "nowhere")
    fails("data.path=.*: no image in it; known suffixes: .jpg")
    make_folder(tmp_path, {"a": [1]})
    fails("data.test_path=.*nowhere: no such folder", test_path="nowhere")
    fails("data.label_column=x has no meaning for data.source=folder", label_column="x")
    fails("data.size=0", size=0)
    make_folder(tmp_path, {".": [9]})
    fails("009.png lies beside class folders such as a")


def test_an_unknown_class_in_the_test_folder_is_refused(tmp_path):
    make_folder(tmp_path, {"train/a": [1], "test/b": [2]})
    with pytest.raises(ValueError, match=r"'b' is not among the 1 training classes"):
        open_images(config("folder", tmp_path), "test")


def test_keys_without_a_meaning_are_refused():
    for source in ("digits", "torchvision"):
        with pytest.raises(ValueError, match=r"data.test_path=x has no meaning"):
            open_images(config(source, test_path="x"), "train")


def test_the_test_split_is_never_augmented(tmp_path):
    make_folder(tmp_path, {"train": [1], "test": [2]})
    ramp = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8), (8, 1)))
    for part in ("train", "test"):
        ramp.save(tmp_path / part / "ramp.png")
    settings = config("folder", tmp_path, crop="random", flip=True)
    draws = np.array([[0.9, 0.5, 0.1, 0.1]])
    last = np.array([1])
    for split, same in (("train", False), ("test", True)):
        images = open_images(settings, split)
        assert torch.equal(images.load(last, draws)["images"], images.load(last)["images"]) == same


def make_mnist(root, part: str, rows: list[int]):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    pixels = b"".join(bytes([level]) * 784 for level in rows)
    (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, len(rows), 28, 28) + pixels)
    (raw / f"{part}-labels-idx1-ubyte").write_bytes(
        struct.pack(">2i", 2049, len(rows)) + bytes(i % 10 for i in range(len(rows)))
    )


def test_torchvision_with_a_train_switch(tmp_path):
    pytest.importorskip("torchvision")
    make_mnist(tmp_path, "train", [1, 2, 3])
    make_mnist(tmp_path, "t10k", [4])
    settings = config("torchvision", tmp_path, name="MNIST")
    assert both(settings) == ([1, 2, 3], [4])
    train = open_images(settings, "train")
    assert train.labels.tolist() == [0, 1, 2] and train.class_names[3] == "3 - three"
    make_mnist(tmp_path, "train", [1, 2, 9])
    assert open_images(settings, "train").identity() != train.identity()


def test_torchvision_with_split_names(tmp_path):
    pytest.importorskip("torchvision")
    make_folder(
        tmp_path / "country211", {"train/x": [1], "train/y": [2], "valid/x": [3], "valid/y": [4], "test/x": [5]}
    )
    make_folder(tmp_path / "country211", {"test/y": [6]})
    assert both(config("torchvision", tmp_path, name="Country211")) == ([1, 2], [5, 6])


def test_torchvision_without_splits_is_divided(tmp_path):
    pytest.importorskip("torchvision")
    make_folder(tmp_path, {"a": [1, 2, 3, 4], "b": [5, 6, 7, 8]})
    train, test = both(config("torchvision", tmp_path, name="ImageFolder", test_fraction=0.25))
    assert sorted(train + test) == list(range(1, 9)) and len(test) == 2


def test_torchvision_faults_are_named(tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match=r"data.name=Imaginary is no class of torchvision.datasets"):
        open_images(config("torchvision", tmp_path, name="Imaginary"), "train")

    def unreachable(self):
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", unreachable)
    with pytest.raises(ValueError, match=r"MNIST is not there and cannot be fetched: no network; put its files there"):
        open_images(config("torchvision", tmp_path, name="MNIST"), "train")
