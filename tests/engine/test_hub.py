"""Data sets of the datasets library, from local copies."""

import sys
from pathlib import Path

import pytest

from engine.sources import open_images

sys.path.insert(0, str(Path(__file__).parent))
from pictures import both, config, grey, make_folder


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    library.disable_progress_bars()
    return library


def make_dataset(datasets, rows: list[int], labels: list[int]):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    cells = [{"bytes": grey(level), "path": None} for level in rows]
    return datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)


def test_a_saved_data_set_with_splits(tmp_path, datasets):
    parts = {"train": make_dataset(datasets, [1, 2], [1, 0]), "validation": make_dataset(datasets, [3], [1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    settings = config("hf", tmp_path / "saved")
    train = open_images(settings, "train")
    assert both(settings) == ([1, 2], [3])
    assert train.class_names == ("cat", "dog") and train.labels.tolist() == [1, 0]
    assert train.identity() == open_images(settings, "train").identity() != open_images(settings, "test").identity()


def test_a_saved_data_set_without_splits_is_divided(tmp_path, datasets):
    make_dataset(datasets, list(range(10)), [0, 1] * 5).save_to_disk(tmp_path / "saved")
    train, test = both(config("hf", tmp_path / "saved", test_fraction=0.2))
    assert sorted(train + test) == list(range(10)) and len(test) == 2


def test_a_local_folder_through_load_dataset(tmp_path, datasets):
    make_folder(tmp_path / "data", {"train/a": [1], "train/b": [2], "test/a": [3], "test/b": [4]})
    settings = config("hf", tmp_path / "data")
    assert both(settings) == ([1, 2], [3, 4]) and open_images(settings, "test").class_names == ("a", "b")


def test_hub_faults_are_named(tmp_path, datasets, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data.path=.*empty: .*give a hub name that can be reached, or a local copy"):
        open_images(config("hf", tmp_path / "empty"), "train")
    parts = {"one": make_dataset(datasets, [1], [1]), "two": make_dataset(datasets, [2], [1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "odd")
    with pytest.raises(ValueError, match=r"no train split among one, two"):
        open_images(config("hf", tmp_path / "odd"), "train")


def test_a_missing_datasets_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'tokenloom\[hub\]'"):
        open_images(config("hf", "x"), "train")
