"""The whole way from images to records: on digits, with raw pixels and a model of two taps."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from engine.config import DataConfig, RunConfig
from engine.device import Device, setup
from engine.images import ImageSet
from engine.sources import open_images
from eval import probe_scores
from eval.config import OnlineProbeConfig, ProbeConfig
from eval.pictures import draw_indices
from eval.probe import TapScore, held_out_split, standardise
from eval.probe_scores import KnnScore, Point, check_counts, score_probe
from eval.statistics import Estimate
from eval.taps import Representation, pixel_representation

CONFIG = ProbeConfig(taps=("pixels", "vim.*"), c_grid=(1e-3, 1e-2, 1e-1), num_train=900, knn_k=20)
ONLINE = OnlineProbeConfig(epochs=3, warmup_epochs=1, batch_size=64, learning_rates=(0.1, 1.0), min_scale=1, flip=False)


@pytest.fixture(scope="module")
def device() -> Device:
    return setup(RunConfig(device="cpu", precision="fp32", threads=1))


@pytest.fixture(scope="module")
def sets() -> tuple[ImageSet, ImageSet]:
    return open_images(DataConfig(size=8), "train"), open_images(DataConfig(size=8), "test")


def fake(passes: list[int]) -> Representation:
    """One tap with pixels, which tell the class, and one with the mean, which does not."""

    def read(images: torch.Tensor, taps: Sequence[str]) -> dict[str, torch.Tensor]:
        passes.append(len(images))
        x = images[:, 0].float().flatten(1)
        return {tap: x if tap == "vim.block2" else x.mean(1, keepdim=True) for tap in taps}

    taps = ("vim.block1", "vim.block2")
    return Representation(name="vim", subject="autoregressive", taps=taps, read=read, facts={"generator": "g"})


def probe(
    config: ProbeConfig, sets: tuple[ImageSet, ImageSet], folder: Path, device: Device, passes: list[int] | None = None
) -> tuple[dict[tuple[str, str], dict[str, Any]], dict[str, Any]]:
    made: list[int] = [] if passes is None else passes
    makers = {"pixels": pixel_representation, "vim": lambda: fake(made)}
    run = RunConfig(name="run", root=str(folder), device="cpu", precision="fp32", threads=1)
    records, content = score_probe(
        config, makers, train_set=sets[0], test_set=sets[1], run=run, cache=folder / "cache", batch_size=128,
        device=device,
    )  # fmt: skip
    return {(entry["subject"], entry["name"]): entry for entry in records}, content


def test_scores_are_those_of_scikit_learn_on_the_same_images(
    sets: tuple[ImageSet, ImageSet], tmp_path: Path, device: Device
) -> None:
    passes: list[int] = []
    found, content = probe(CONFIG, sets, tmp_path, device, passes)
    rows = draw_indices(np.flatnonzero(sets[0].labels >= 0), 900, seed=0)
    batch, test = sets[0].load(rows), sets[1].load(np.arange(len(sets[1])))
    x, test_x = (each["images"].flatten(1).float() / 127.5 - 1 for each in (batch, test))
    y, test_y = batch["labels"].numpy(), test["labels"].numpy()
    row = content["curve"][0]
    scaled = [each.double().numpy() for each in standardise(x, test_x)]
    theirs = LogisticRegression(C=row["c"], tol=1e-6, max_iter=3000).fit(scaled[0], y)
    assert found["pixels", "probe_top1"]["value"] == pytest.approx(theirs.score(scaled[1], test_y), abs=0.005)
    top5 = np.argsort(-theirs.decision_function(scaled[1]), axis=1)[:, :5] == test_y[:, None]
    assert found["pixels", "probe_top5"]["value"] == pytest.approx(top5.any(1).mean(), abs=0.005)
    near = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(x.numpy(), y)
    assert found["pixels", "knn_top1"]["value"] == pytest.approx(near.score(test_x.numpy(), test_y), abs=1e-6)
    assert sum(passes) == 900 + len(sets[1])
    passes.clear()
    assert probe(CONFIG, sets, tmp_path, device, passes) == (found, content)
    assert not passes  # features are kept
    probe(dataclasses.replace(CONFIG, taps=("vim.block1",)), sets, tmp_path, device, passes)
    assert passes  # under the taps that were read


def test_held_out_images_choose_the_tap_and_the_curve_tells_of_all(
    sets: tuple[ImageSet, ImageSet], tmp_path: Path, device: Device
) -> None:
    found, content = probe(CONFIG, sets, tmp_path, device)
    assert {key: entry["tap"] for key, entry in found.items()} == {
        (subject, name): tap
        for subject, tap in (("pixels", "pixels"), ("autoregressive", "vim.block2"))
        for name in ("probe_top1", "probe_top5", "knn_top1")
    }
    curve = {row["tap"]: row for row in content["curve"]}
    assert [(row["family"], row["tap"]) for row in content["curve"]] == [
        ("pixels", "pixels"), ("autoregressive", "vim.block1"), ("autoregressive", "vim.block2"),
    ]  # fmt: skip
    for key in ("held_out_top1", "test_top1", "test_top5", "knn_top1", "knn_held_out_top1"):
        assert curve["vim.block2"][key] > curve["vim.block1"][key]
    entry = found["autoregressive", "probe_top1"]
    assert entry["value"] == curve["vim.block2"]["test_top1"] and entry["interval"] == curve["vim.block2"]["interval"]
    stated = entry["protocol"]
    assert stated["settings"]["protocol"] == "lbfgs" and stated["settings"]["num_train"] == 900
    assert stated["subject"] == {"generator": "g"} and stated["num_real"] == entry["n"] == len(sets[1])
    near = found["autoregressive", "knn_top1"]["protocol"]
    assert near["settings"]["k"] == 20 and near["hash"] != stated["hash"] and near["reference"] == stated["reference"]
    assert content["protocol"]["hash"] == stated["hash"]


def test_test_labels_choose_nothing(sets: tuple[ImageSet, ImageSet], tmp_path: Path, device: Device) -> None:
    before, _ = probe(CONFIG, sets, tmp_path, device)
    true = sets[1].labels
    sets[1].labels = np.zeros_like(true)
    try:
        after, content = probe(CONFIG, sets, tmp_path, device)
    finally:
        sets[1].labels = true
    assert {key: entry["tap"] for key, entry in after.items()} == {key: entry["tap"] for key, entry in before.items()}
    assert after["pixels", "probe_top1"]["value"] < 0.3 < content["curve"][0]["held_out_top1"]


def test_held_out_images_are_not_among_their_own_neighbours(
    sets: tuple[ImageSet, ImageSet], tmp_path: Path, device: Device
) -> None:
    true = sets[0].labels
    sets[0].labels = np.random.default_rng(0).permutation(true)
    try:
        _, content = probe(dataclasses.replace(CONFIG, taps=("pixels",), knn_k=1), sets, tmp_path, device)
    finally:
        sets[0].labels = true
    assert content["curve"][0]["knn_held_out_top1"] < 0.3


def test_k_nn_and_the_linear_probe_choose_their_taps_on_held_out_images() -> None:
    def point(tap: str, linear: tuple[float, float], near: tuple[float, float]) -> Point:
        score = TapScore(tap, 1.0, linear[0], False, Estimate(linear[1], None), None)
        return Point(score, KnnScore(near[0], Estimate(near[1], None)))

    curve = [point("vim.block1", (0.5, 0.9), (0.6, 0.1)), point("vim.block2", (0.6, 0.2), (0.5, 0.8))]
    records = probe_scores._records(fake([]), curve, {"num_real": 50}, CONFIG, 900)
    found = {entry["name"]: (entry["tap"], entry["value"]) for entry in records}
    assert found == {"probe_top1": ("vim.block2", 0.2), "knn_top1": ("vim.block1", 0.1)}


def test_heads_never_meet_the_held_out_images(
    sets: tuple[ImageSet, ImageSet], tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[np.ndarray] = []

    class Stop(Exception):
        pass

    def train_heads(*_: Any, rows: np.ndarray, **__: Any) -> None:
        met.append(rows)
        raise Stop

    monkeypatch.setattr(probe_scores, "train_heads", train_heads)
    with pytest.raises(Stop):
        probe(dataclasses.replace(CONFIG, protocol="mae", online=ONLINE), sets, tmp_path, device)
    drawn = draw_indices(np.flatnonzero(sets[0].labels >= 0), 900, seed=0)
    fitted, held = (drawn[part.numpy()] for part in held_out_split(900, 0.1, 0))
    assert np.array_equal(met[0], fitted) and not set(met[0]) & set(held)


def test_heads_trained_by_sgd_give_the_same_kind_of_scores(
    sets: tuple[ImageSet, ImageSet], tmp_path: Path, device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(CONFIG, protocol="mae", online=ONLINE)
    found, content = probe(config, sets, tmp_path, device)
    assert {key for _, key in found} == {"probe_top1", "probe_top5"}  # k-NN goes with features of plain images
    assert found["autoregressive", "probe_top1"]["tap"] == "vim.block2"
    assert found["pixels", "probe_top1"]["value"] > 0.8
    settings = found["pixels", "probe_top1"]["protocol"]["settings"]
    assert (settings["protocol"], settings["epochs"], settings["optimizer"]) == ("mae", 3, "sgd")
    assert {row["learning_rate"] for row in content["curve"]} <= {0.1, 1.0} and content["curve"][0]["knn_top1"] is None
    assert "at an end of eval.probe.online.learning_rates" in capsys.readouterr().out
    assert probe(config, sets, tmp_path, device) == (found, content)


def test_the_end_of_the_grid_is_told(
    sets: tuple[ImageSet, ImageSet], tmp_path: Path, device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    probe(dataclasses.replace(CONFIG, taps=("pixels",), c_grid=(1e-9, 1e-2)), sets, tmp_path, device)
    told = "probe: the best C of pixels is 0.01, at an end of eval.probe.c_grid; one beyond may be better"
    assert told in capsys.readouterr().out


def test_without_two_classes_there_is_no_probe(
    sets: tuple[ImageSet, ImageSet], tmp_path: Path, device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    true = sets[0].labels
    sets[0].labels = np.full_like(true, -1)
    try:
        assert probe(CONFIG, sets, tmp_path, device) == ({}, {})
    finally:
        sets[0].labels = true
    assert "probe left out: the images have no labels of at least two classes" in capsys.readouterr().out


def test_without_a_model_that_is_asked_for_there_is_no_probe(
    sets: tuple[ImageSet, ImageSet], tmp_path: Path, device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    assert probe(dataclasses.replace(CONFIG, taps=("dit.block1",)), sets, tmp_path, device) == ({}, {})
    assert "the run has no model that eval.probe.taps=['dit.block1'] names" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"knn_k": 811}, r"eval\.probe\.knn_k=811 neighbours, .* only 810 are labelled and not held out"),
        ({"num_train": 4}, r"eval\.probe\.held_out=0\.1 of 4 labelled training images leaves one part empty"),
    ],
)
def test_too_few_images_are_told_before_any_is_seen(
    changes: dict[str, Any], told: str, sets: tuple[ImageSet, ImageSet], tmp_path: Path, device: Device
) -> None:
    passes: list[int] = []
    with pytest.raises(ValueError, match=told):
        probe(dataclasses.replace(CONFIG, **changes), sets, tmp_path, device, passes)
    assert not passes


def test_test_images_without_labels_are_an_error(sets: tuple[ImageSet, ImageSet]) -> None:
    train_set, test_set = copy.copy(sets[0]), copy.copy(sets[1])
    check_counts(CONFIG, train_set, test_set)
    test_set.labels = np.full(len(test_set), -1)
    with pytest.raises(ValueError, match=r"the test images none: give labelled ones as data\.test_path"):
        check_counts(CONFIG, train_set, test_set)
    train_set.labels = np.full(len(train_set), -1)
    check_counts(CONFIG, train_set, test_set)  # there will be no probe


def test_much_room_is_told_in_advance(
    sets: tuple[ImageSet, ImageSet], tmp_path: Path, device: Device,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    probe(dataclasses.replace(CONFIG, taps=("pixels",)), sets, tmp_path, device)
    assert "GB" not in capsys.readouterr().out
    monkeypatch.setattr(probe_scores, "MANY", 1)
    probe(dataclasses.replace(CONFIG, taps=("pixels",), num_train=0), sets, tmp_path, device)
    count = len(sets[0]) + len(sets[1])
    taken = f"probe: features of {count:,} images take {4 * count * 192 / 1e9:.3g} GB in {tmp_path / 'cache'}"
    assert taken in capsys.readouterr().out
