"""Images that were not made here are scored as our own are: same images, same numbers, whatever they lie in."""

import dataclasses
import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.checkpoint import save_model
from engine.config import DataConfig, RunConfig
from engine.device import setup
from engine.sources import open_images
from eval.classifier import Classifier
from eval.comparison import compare
from eval.config import ClassifierConfig, EvalConfig
from eval.features import RandomFeatures
from eval.outside import OutsideConfig, judge_files
from eval.outside_inputs import subject_of
from eval.protocol import read_scores

sys.path.insert(0, str(Path(__file__).parent))
from untrained import EVAL, make_run, scores


def digits(count: int, start: int = 0, size: int = 16) -> torch.Tensor:
    return open_images(DataConfig(size=size), "train").load(np.arange(start, start + count))["images"]


def write_folder(folder: Path, images: torch.Tensor, *, classes: int = 0) -> Path:
    for index, image in enumerate(images):
        place = folder / f"class{index % classes}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{index:04d}.png")
    return folder


def judged(tmp_path: Path, generated: Path | None, reference: Path, **how: Any) -> dict[tuple[str, str], dict]:
    eval = EvalConfig(features=("random",), **how.pop("eval", {}))
    run = RunConfig(root=str(tmp_path / "runs"), device="cpu", threads=1)
    config = OutsideConfig(run=run, eval=eval)
    records = judge_files(generated, reference, config=config, device=setup(run), **how)
    return {(entry["subject"], entry["name"]): entry for entry in records}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return write_folder(tmp_path / "made", digits(30), classes=5), write_folder(tmp_path / "real", digits(80, 100))


def test_a_folder_is_scored_beside_the_floor(folders: tuple[Path, Path], tmp_path: Path) -> None:
    found = judged(tmp_path, *folders, out=tmp_path / "scores.json")
    names = {"fd_random", "kid", "precision", "recall", "density", "coverage"}
    assert set(found) == {(subject, name) for subject in ("made", "real") for name in names}
    stated = found["made", "fd_random"]["protocol"]
    assert (stated["num_generated"], stated["num_real"], stated["size"]) == (30, 80, 16)
    assert stated["labels"] == "balanced" and stated["subject"]["rounding"] == "as stored"
    assert found["real", "fd_random"]["protocol"]["num_real"] == 50  # the other 30 are held against them
    assert [entry["value"] for entry in read_scores(tmp_path / "scores.json")] == [e["value"] for e in found.values()]


def test_zip_and_arrays_of_the_same_images_score_the_same(folders: tuple[Path, Path], tmp_path: Path) -> None:
    made, real = folders
    files = sorted(made.rglob("*.png"))
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as archive:
        for path in files:
            archive.write(path, path.relative_to(made))
    array = np.stack([np.asarray(Image.open(path)) for path in files])
    np.savez(tmp_path / "made.npz", arr_0=array, arr_1=np.arange(len(files)) % 5)
    expected = judged(tmp_path, made, real)
    for name in ("made.zip", "made.npz"):
        found = judged(tmp_path, tmp_path / name, real)
        assert {key: entry["value"] for key, entry in found.items()} == {k: e["value"] for k, e in expected.items()}
        assert found["made", "kid"]["protocol"]["hash"] == expected["made", "kid"]["protocol"]["hash"]


def test_statistics_of_a_reference_serve_as_the_reference(folders: tuple[Path, Path], tmp_path: Path) -> None:
    made, real = folders
    assert judged(tmp_path, None, real, statistics=tmp_path / "real.npz") == {}
    with np.load(tmp_path / "real.npz") as stored:
        assert stored["mu"].shape == (256,) and stored["sigma"].shape == (256, 256)
    ((key, entry),) = judged(tmp_path, made, tmp_path / "real.npz").items()
    expected = judged(tmp_path, made, real)[key]
    assert key == ("made", "fd_random") and entry["value"] == pytest.approx(expected["value"], rel=1e-9)
    assert entry["protocol"]["hash"] == expected["protocol"]["hash"]


def test_a_part_of_the_images_is_drawn_at_random(folders: tuple[Path, Path], tmp_path: Path) -> None:
    found = judged(tmp_path, *folders, num=25)["made", "fd_random"]
    assert found["n"] == 25 and found["protocol"]["subject"]["drawn"] == 25
    for num in (31, -1):
        with pytest.raises(ValueError, match=rf"--num {num}: .* has 30 images; 0 takes all"):
            judged(tmp_path, *folders, num=num)


def test_images_of_another_size_are_refused_unless_one_size_is_asked(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    large = write_folder(tmp_path / "large", digits(24, size=32))
    with pytest.raises(ValueError, match=r"32 x 32 and 16 x 16 pixels.*--size 16"):
        judged(tmp_path, large, folders[1])
    found = judged(tmp_path, large, folders[1], size=16)
    assert found["large", "fd_random"]["protocol"]["size"] == 16


def test_a_run_is_read_with_its_samples_and_its_training_images(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    inside = scores(run, "fid", dataclasses.replace(EVAL, features=("random",), reference="all"))
    (run.folder / "config.yaml").write_text("data:\n  source: digits\n  size: 16\n")
    found = judged(tmp_path, run.folder, run.folder, out=tmp_path / "again.json")
    assert {subject for subject, _ in found} == {"autoregressive", "diffusion", "real"}
    subject = found["diffusion", "fd_random"]["protocol"]["subject"]
    mine = inside["diffusion", "fd_random"]["protocol"]["subject"]
    assert subject["generator"] == mine["generator"] and subject["settings"] == mine["settings"]
    assert found["diffusion", "fd_random"]["protocol"]["num_real"] == 1438
    # The run's own scores and those of its files are the same, and may stand side by side.
    shared = [key for key in found if key[0] != "real"]
    assert [found[key]["value"] for key in shared] == pytest.approx([inside[key]["value"] for key in shared], rel=1e-9)
    told = [each["diffusion", "kid"]["protocol"]["reference_images"] for each in (found, inside)]
    assert told[0] == told[1] and told[0]["split"] == "train"
    beside = compare([run.folder, tmp_path / "again.json"])
    assert {label for label, _ in beside.unlike} <= {"again/real"}
    assert {"digits/diffusion", "again/diffusion"} <= {model.label for model in beside.rows("Generators")}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/model.v2", "model.v2"),
        ("a/model.v2.npz", "model.v2"),
        ("my samples.zip", "my-samples"),
        ("train-*.parquet", "train"),
        ("real", "generated"),
        ("/", "generated"),
    ],
)
def test_a_subject_is_named_after_its_file(path: str, name: str) -> None:
    assert subject_of(Path(path)) == name


def test_images_in_the_working_folder_have_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made.v1").mkdir()
    monkeypatch.chdir(tmp_path / "made.v1")
    assert subject_of(Path(".")) == "made.v1"


def test_a_folder_called_real_is_not_mistaken_for_the_floor(folders: tuple[Path, Path], tmp_path: Path) -> None:
    made, real = folders
    (tmp_path / "others").mkdir()
    found = judged(tmp_path, made.rename(tmp_path / "others" / "real"), real)
    assert {subject for subject, _ in found} == {"generated", "real"} and len(found) == 12


def never(*_: object, **__: object) -> None:
    raise AssertionError("features were computed before the mistake was told")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"out": "folder"}, r"folder: name a file that ends in \.json"),
        ({"out": "mine.npz/scores.json"}, r"mine\.npz is no folder that can be written to"),
        ({"statistics": "real.txt"}, r"real\.txt: name a file that ends in \.npz"),
        ({"num": 19}, r"made: 19 images are too few: with eval\.convention=unbiased it takes 20"),
        ({"eval": {"convention": "torch_fidelity"}}, r"real has 80 images, .*torch_fidelity it takes 1000"),
        ({"eval": {"neighbours": 2}}, r"eval\.neighbours=2 draws a sheet beside the scores"),
        ({"reference": "large"}, r"16 x 16 and 32 x 32 pixels.*--size 16"),
        ({"reference": "few"}, r"few has 8 images, .* it takes 20"),
        ({"reference": "yaml"}, r"config\.yaml: no section data"),
        ({"reference": "key"}, r"unknown key 'sise' in .*config\.yaml: did you mean 'size'"),
        ({"reference": "other.npz"}, r"other\.npz does not say by which features"),
        ({"reference": "mine.npz", "statistics": "x.npz"}, r"x\.npz: the reference has no images to measure"),
    ],
)
def test_mistakes_are_told_before_the_work(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], message: str
) -> None:
    write_folder(tmp_path / "large", digits(24, size=32))
    write_folder(tmp_path / "few", digits(8))
    for name, text in (("yaml", "model: {}"), ("key", "data: {sise: 16}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    for name in ("other.npz", "mine.npz"):
        np.savez(tmp_path / name, mu=np.zeros(8), sigma=np.eye(8))
    monkeypatch.setattr(RandomFeatures, "outputs", never)
    (tmp_path / "folder").mkdir()
    places = {key: tmp_path / how[key] for key in ("out", "statistics") if key in how}
    rest = {key: value for key, value in how.items() if key not in ("out", "statistics", "reference")}
    with pytest.raises(ValueError, match=message):
        judged(tmp_path, folders[0], tmp_path / how.get("reference", "real"), **places, **rest)


def test_images_beside_stated_statistics_serve_other_networks(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = digits(80, 100).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "adm.npz", arr_0=pixels, mu=np.zeros(2048), sigma=np.eye(2048))
    found = judged(tmp_path, folders[0], tmp_path / "adm.npz", statistics=tmp_path / "measured.npz")
    assert "statistics of adm.npz are not of random: its images serve them" in capsys.readouterr().out
    of_folder = judged(tmp_path, *folders)
    for name in ("fd_random", "kid", "recall"):
        mine, theirs = (each["made", name] for each in (found, of_folder))
        assert mine["value"] == theirs["value"] and mine["protocol"]["hash"] == theirs["protocol"]["hash"]
    with np.load(tmp_path / "measured.npz") as stored:  # of the images, not what the file states
        assert stored["mu"].shape == (256,) and int(stored["n"]) == 80


def test_class_accuracy_asks_for_the_classifiers_own_labels(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    network = Classifier((8, 8, 8), 5)
    card = {"kind": "classifier", "num_classes": 5, "config": {"widths": [8, 8, 8]}}
    save_model(tmp_path / "classifier", network.state_dict(), card)
    made, real = folders
    eval = EvalConfig(features=("classifier",), classifier=ClassifierConfig(path=str(tmp_path / "classifier")))
    run = RunConfig(root=str(tmp_path / "runs"), device="cpu", threads=1)

    def accuracy(generated: Path) -> float | None:
        records = judge_files(generated, real, config=OutsideConfig(run=run, eval=eval), device=setup(run))
        return next((entry["value"] for entry in records if entry["name"] == "class_accuracy"), None)

    files = sorted(made.rglob("*.png"))
    images = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in files])
    asked = torch.tensor([int(path.parent.name[-1]) for path in files])
    with torch.no_grad():
        expected = (network.eval()(images).argmax(1) == asked).double().mean().item()
    assert accuracy(made) == expected
    shutil.rmtree(made / "class0")  # class1 is the first folder now, and would have the number 0
    assert accuracy(made) is None
    assert "class_accuracy of" in capsys.readouterr().out
    np.savez(tmp_path / "numbers.npz", arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=asked.clamp(max=3).numpy())
    assert accuracy(tmp_path / "numbers.npz") is not None  # numbers stay what they are


def test_the_sheet_of_neighbours_is_written(folders: tuple[Path, Path], tmp_path: Path) -> None:
    real = write_folder(tmp_path / "seen", torch.cat([digits(4), digits(60, 200)]))
    judged(tmp_path, folders[0], real, out=tmp_path / "scores.json", eval={"neighbours": 3})
    told = json.loads((tmp_path / "scores-neighbours-made.json").read_text())
    assert (tmp_path / "scores-neighbours-made.png").is_file()
    assert max(row[0] for row in told["distances"]) == 0  # images of the reference itself


def test_classifier_features_need_a_trained_classifier(folders: tuple[Path, Path], tmp_path: Path) -> None:
    run = RunConfig(root=str(tmp_path), device="cpu", threads=1)
    config = OutsideConfig(run=run, eval=EvalConfig(features=("classifier",)))
    with pytest.raises(ValueError, match=r"--eval\.classifier\.path"):
        judge_files(*folders, config=config, device=setup(run))


def test_features_are_inceptions_unless_named() -> None:
    assert OutsideConfig().eval.features == ("inception",)
