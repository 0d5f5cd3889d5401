import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import DataConfig, RunConfig, TrainConfig
from engine.device import setup
from engine.sources import open_images
from eval.classifier import Classifier, class_count, shifted, train_classifier
from eval.config import ClassifierConfig

CONFIG = ClassifierConfig(
    widths=(16, 32, 32),
    shift=0,
    train=TrainConfig(steps=60, batch_size=32, learning_rate=4e-3, ema=0.9, preview_every=0, log_every=60),
)


def trained(root: Path, config: ClassifierConfig = CONFIG, **run: object) -> tuple[Classifier, dict]:
    settings = RunConfig(root=str(root), device="cpu", precision="fp32", threads=1, **run)
    data = DataConfig(size=16)
    return train_classifier(
        config,
        train_set=open_images(data, "train"),
        test_set=open_images(data, "test"),
        run=settings,
        device=setup(settings),
    )


def test_it_learns_and_is_kept_for_the_next_call(tmp_path, capsys) -> None:
    network, card = trained(tmp_path)
    assert card["accuracy"] > 0.85
    assert "of the test images right" in capsys.readouterr().out
    again, _ = trained(tmp_path)
    assert torch.equal(network.head.weight, again.head.weight)
    assert capsys.readouterr().out == ""


def test_runs_with_other_seeds_have_the_same_judge(tmp_path) -> None:
    short = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps=2))
    networks = [trained(tmp_path, short, name=f"seed-{seed}", seed=seed)[0] for seed in (0, 1)]
    assert torch.equal(networks[0].head.weight, networks[1].head.weight)
    shared = dataclasses.replace(short, path=str(tmp_path / "seed-0" / "eval" / "classifier"))
    assert torch.equal(trained(tmp_path / "other", shared)[0].head.weight, networks[0].head.weight)


def test_a_classifier_of_other_classes_is_refused(tmp_path) -> None:
    from engine.checkpoint import save_model

    network = Classifier((8, 8, 8), 3)
    card = {"kind": "classifier", "num_classes": 3, "config": {"classifier": {"widths": [8, 8, 8]}}}
    save_model(tmp_path, network.state_dict(), card)
    with pytest.raises(ValueError, match="of 3 classes; the data set needs one of 10"):
        trained(tmp_path, dataclasses.replace(CONFIG, path=str(tmp_path)))


def test_default_size_is_about_a_third_of_a_million() -> None:
    network = Classifier(ClassifierConfig().widths, 10)
    assert 0.25e6 < sum(parameter.numel() for parameter in network.parameters()) < 0.4e6
    for size in (28, 64):
        assert network(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape == (1, 10)


def test_shifting_moves_pixels_and_repeats_the_border() -> None:
    images = torch.arange(2 * 3 * 16, dtype=torch.uint8).reshape(2, 3, 4, 4)
    offsets = torch.tensor([[1, 1], [2, 0]])
    moved = shifted(images, offsets, 1)
    assert torch.equal(moved[0], images[0])
    assert torch.equal(moved[1, :, :3, 1:], images[1, :, 1:, :3])
    assert torch.equal(moved[1, :, 3, 1:], images[1, :, 3, :3])


def test_class_count() -> None:
    assert class_count(np.array([0, 2, -1])) == 3
    assert class_count(np.array([0, 1]), ("a", "b", "c")) == 3
    assert class_count(np.array([-1, -1]), ()) == 0
