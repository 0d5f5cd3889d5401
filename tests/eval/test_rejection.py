"""The best of many candidates: which they are, that they say so, and that nothing is drawn twice."""

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config import DataConfig, RunConfig
from engine.device import setup
from engine.sources import open_images
from eval.config import RejectionConfig
from eval.rejection import Picker, best_of_classes, num_candidates, open_picker, sample_accepted, subject_name
from generator.sample import sample, sample_images

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import forked
from untrained import EVAL, FAMILIES, make_run, write_yaml

SEEDED = dataclasses.replace(EVAL.classifier, seed=1)


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return make_run(tmp_path)


@pytest.fixture
def picker(run: RunConfig) -> Picker:
    train_set, test_set = (open_images(DataConfig(size=16), split) for split in ("train", "test"))
    return open_picker(SEEDED, train_set=train_set, test_set=test_set, run=run, device=setup(run))


def accepted(run: RunConfig, picker: Picker, name: str = "kept", **changes: Any) -> Path:
    settings: dict[str, Any] = {"family": "autoregressive", "config": FAMILIES["autoregressive"], "acceptance": 0.25}
    places = {"out": run.folder / "samples" / name, "pool": run.folder / "samples" / "pool"}
    return sample_accepted(run=run, device=setup(run), picker=picker, **{**settings, **places, "num": 12, **changes})


def read(folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    told = json.loads((folder / "samples.json").read_text())
    return told, np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))])


def test_the_best_of_each_class_are_kept_in_their_order() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    scores = torch.tensor([0.1, 0.9, 0.5, 0.8, 0.2, 0.5, 0.3, 0.95, 0.5])
    kept = best_of_classes(scores, labels, torch.tensor([2, 0, 1, 0]))
    assert kept.tolist() == [2, 3, 6, 7]  # of class 2 all are equal: the first
    assert best_of_classes(scores, labels, labels).tolist() == list(range(9))


def test_so_many_candidates_that_the_share_is_kept() -> None:
    assert [num_candidates(64, share) for share in (0.5, 0.25, 0.1, 0.3)] == [128, 256, 640, 214]
    assert num_candidates(3, 0.3) == 10
    for share in (0, 1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"must lie between 0 and 1"):
            num_candidates(64, share)
    assert subject_name("diffusion", 0.25) == "diffusion@accept0.25"


@pytest.mark.parametrize("family", list(FAMILIES))
def test_kept_samples_are_the_candidates_that_the_classifier_likes_best(
    run: RunConfig, picker: Picker, family: str
) -> None:
    how = {"family": family, "config": FAMILIES[family]}
    told, images = read(accepted(run, picker, **how))
    assert (told["acceptance"], told["candidates"], told["classifier"]) == (0.25, 48, picker.fingerprint)
    assert sorted(told["labels"]) == sorted([*range(10), 0, 1])  # as without rejection
    assert told["seeds"] == sorted(told["seeds"]) and max(told["seeds"]) < 48
    candidates, drawn = read(run.folder / "samples" / "pool")
    assert candidates["seeds"] == list(range(48)) and candidates["labels"][12:24] == candidates["labels"][:12]
    assert np.array_equal(images, drawn[told["seeds"]])
    logits = picker.network(torch.from_numpy(drawn).permute(0, 3, 1, 2))
    asked = torch.tensor(candidates["labels"])
    probability = logits.softmax(1)[torch.arange(48), asked]
    assert told["probability"] == pytest.approx(probability[told["seeds"]].tolist(), abs=2e-6)
    for label in range(10):
        rows = (asked == label).nonzero().flatten().tolist()
        kept = [row for row in rows if row in told["seeds"]]
        assert min(probability[kept]) >= max([probability[row] for row in rows if row not in kept])


def test_a_larger_acceptance_and_the_plain_samples_share_the_candidates(
    run: RunConfig, picker: Picker, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = sample(run=run, config=FAMILIES["autoregressive"], family="autoregressive", device=setup(run), num=24)
    drawn = []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        drawn.extend(args[3])
        return sample_images(*args, **kwargs)

    monkeypatch.setattr("generator.sample.sample_images", counted)
    half, _ = read(accepted(run, picker, "half", acceptance=0.5, num=24, largest=96, known=[plain]))
    assert drawn == list(range(24, 96)) and max(half["seeds"]) < 48
    quarter, _ = read(accepted(run, picker, "quarter", num=24))
    assert len(drawn) == 72 and quarter["candidates"] == 96
    stamp = (run.folder / "samples" / "half" / "000000.png").stat().st_mtime_ns
    accepted(run, picker, "half", acceptance=0.5, num=24)
    assert (run.folder / "samples" / "half" / "000000.png").stat().st_mtime_ns == stamp


def test_an_interrupted_choice_goes_on_with_its_candidates(
    run: RunConfig, picker: Picker, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, images = read(accepted(run, picker, "whole", pool=run.folder / "samples" / "other"))

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("eval.rejection.publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            accepted(run, picker)
    assert not (run.folder / "samples" / "kept").exists()
    monkeypatch.setattr("generator.sample.sample_images", interrupted)
    told, again = read(accepted(run, picker))
    assert told == whole and np.array_equal(images, again)


def test_another_request_takes_the_place_of_the_old_one(run: RunConfig, picker: Picker) -> None:
    first, _ = read(accepted(run, picker))
    other, _ = read(accepted(run, picker._replace(fingerprint="another")))
    assert other["classifier"] == "another" and other["seeds"] == first["seeds"]
    ones, _ = read(accepted(run, picker, label=1, seed=2, num=4))
    assert ones["labels"] == [1, 1, 1, 1] and all(seed // 1_000_000 == 2 for seed in ones["seeds"])


def test_refusals(run: RunConfig, picker: Picker, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(ValueError, match=r"holds files but no samples\.json"):
        accepted(run, picker, out=tmp_path / "mine")
    with pytest.raises(ValueError, match=r"acceptance=2 must lie between 0 and 1"):
        accepted(run, picker, acceptance=2)
    with pytest.raises(ValueError, match="knows 10 classes, but autoregressive 3"):
        accepted(make_run(tmp_path / "three", num_classes=3), picker)
    with pytest.raises(ValueError, match=r"autoregressive was trained without classes: leave the acceptance out"):
        accepted(make_run(tmp_path / "none", num_classes=0), picker)


@pytest.mark.slow
def test_two_processes_keep_what_one_keeps(run: RunConfig, tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "trial.yaml", dataclasses.replace(EVAL, rejection=RejectionConfig(classifier=SEEDED)))
    shutil.copytree(run.folder, tmp_path / "two" / "digits")
    place = f"--eval.rejection.classifier.path={run.folder / 'eval' / 'rejection_classifier'}"
    for root, execute, more in ((tmp_path, forked.run, []), (tmp_path / "two", forked.run_two, [place])):
        words = ["sample", "--config", str(path), f"--run.root={root}", "--acceptance", "0.25", *more]
        words += ["--count", "40", "--only", "autoregressive", "--out", str(root / "out")]
        execute("tokenloom.cli:main", words, told=tmp_path / "told")
    (one, images), (other, again) = (read(root / "out" / "autoregressive") for root in (tmp_path, tmp_path / "two"))
    assert one == other and np.array_equal(images, again)
    assert [each.name for each in (tmp_path / "two" / "out").iterdir()] == ["autoregressive"]  # no candidates left
