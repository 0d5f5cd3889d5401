"""What the commands do, from Python; `test_pipeline.py` asks the rest of a trained run."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tokenloom
from engine.checkpoint import load_model
from engine.snapshots import write_snapshot
from eval.protocol import read_scores

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
from untrained import make_run


def test_images_can_be_streamed(tmp_path: Path) -> None:
    folder, settings = make_run(tmp_path).folder, {"labels": [3, 7], "seeds": [0, 1], "batch_size": 2}
    steps = list(tokenloom.stream(folder, **settings))
    assert [done for done, _ in steps] == [4, 8, 12, 16]  # a row of the grid each
    assert torch.equal(steps[-1][1], tokenloom.sample(folder, "autoregressive", **settings))
    assert [done for done, _ in tokenloom.stream(folder, seeds=[0], every=7)] == [7, 14, 16]
    with pytest.raises(ValueError, match="labels has 1 entries, seeds 2"):
        tokenloom.stream(folder, labels=[3], seeds=[0, 1])
    shutil.rmtree(folder / "autoregressive")
    with pytest.raises(ValueError, match="holds no autoregressive generator, whose samples alone grow code by code"):
        tokenloom.stream(folder, seeds=[0])


def test_images_of_any_maker_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # features are kept in the working folder's runs
    random = np.random.default_rng(0)
    for name in ("made", "real"):
        np.savez(f"{name}.npz", arr_0=random.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8))
    settings = {"features": ["random"], "num": 20, "neighbours": 1, "out": "scores.json"}
    found = tokenloom.score_images("made.npz", "real.npz", **settings)
    assert {entry["subject"] for entry in found} == {"made", "real"} and {entry["n"] for entry in found} == {20}
    assert read_scores(Path("scores.json")) == found and Path("scores-neighbours-made.png").is_file()


def test_a_snapshot_of_the_training_is_asked_for_by_its_step(tmp_path: Path) -> None:
    folder = make_run(tmp_path).folder
    _, weights = load_model(folder / "diffusion")
    halves = {name: 0.5 * value for name, value in weights.items()}
    for step, network in ((10, halves), (20, weights)):
        write_snapshot(folder / "diffusion" / "snapshots", step, updates=step, model=network, widths={})
    images = {step: tokenloom.sample(folder, "diffusion", labels=[3], seeds=[0], snapshot=step) for step in (None, 20)}
    assert torch.equal(images[None], images[20])
    model = tokenloom.load_generator(folder, "diffusion", snapshot=10)
    assert model.fingerprint != tokenloom.load_generator(folder, "diffusion").fingerprint
    with pytest.raises(ValueError, match="no snapshot of step 15: there are those of steps 10, 20"):
        tokenloom.sample(folder, "diffusion", labels=[3], seeds=[0], snapshot=15)


def test_one_text_is_no_list_of_texts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompts='ab' is one text: give a list"):
        tokenloom.sample(make_run(tmp_path).folder, "diffusion", prompts="ab", seeds=[0, 1])
