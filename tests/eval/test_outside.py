"""Images that were not made here are scored as our own are: same images, same numbers, whatever they lie in."""

import dataclasses
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config import DataConfig, RunConfig, to_yaml
from engine.device import setup
from engine.sources import open_images
from eval.config import EvalConfig
from eval.outside import OutsideConfig, judge_files
from eval.protocol import read_scores

sys.path.insert(0, str(Path(__file__).parent))
from untrained import make_run, scores


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
    with pytest.raises(ValueError, match=r"--num 31: .* has 30 images"):
        judged(tmp_path, *folders, num=31)


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
    inside = scores(run, "fid")
    (run.folder / "config.yaml").write_text("data:\n  source: digits\n  size: 16\n")
    found = judged(tmp_path, run.folder, run.folder)
    assert {subject for subject, _ in found} == {"autoregressive", "diffusion", "real"}
    subject = found["diffusion", "fd_random"]["protocol"]["subject"]
    mine = inside["diffusion", "fd_random"]["protocol"]["subject"]
    assert subject["generator"] == mine["generator"] and subject["settings"] == mine["settings"]
    assert found["diffusion", "fd_random"]["protocol"]["num_real"] == 1438


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
    assert "inception" in to_yaml(OutsideConfig()) and dataclasses.is_dataclass(OutsideConfig)
