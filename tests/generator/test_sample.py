"""Images from a generator: in memory, and as files that say what they are."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.checkpoint import save_model
from engine.config import RunConfig
from engine.device import Device
from engine.shards import open_shards
from generator.autoregressive import build_network
from generator.card import generator_card
from generator.config import (
    AutoregressiveConfig,
    AutoregressiveModelConfig,
    AutoregressiveSampleConfig,
    DenoiserModelConfig,
    DiffusionConfig,
    DiffusionSampleConfig,
)
from generator.diffusion import build_denoiser
from generator.sample import grid_rows, load_generator, sample, sample_images
from tokenizer.model import load_tokenizer

CONFIGS = {
    "autoregressive": AutoregressiveConfig(
        model=AutoregressiveModelConfig(preset="tiny", depth=1, width=16, heads=2),
        sample=AutoregressiveSampleConfig(batch_size=4),
    ),
    "diffusion": DiffusionConfig(
        model=DenoiserModelConfig(preset="tiny", depth=1, width=16, heads=2),
        sample=DiffusionSampleConfig(num_steps=2, batch_size=4),
    ),
}
FAMILIES = tuple(CONFIGS)


@pytest.fixture
def finished(run: RunConfig) -> RunConfig:
    """The run with an untrained generator of each family."""
    shards, tokenizer = open_shards(run.folder / "codes" / "train"), load_tokenizer(run.folder)
    for (family, config), build in zip(CONFIGS.items(), (build_network, build_denoiser), strict=True):
        card = generator_card(config, shards, tokenizer)
        torch.manual_seed(0)
        network = build(config.model, card)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        save_model(run.folder / family, network.state_dict(), card)
    return run


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_depends_on_its_seed_and_label_alone(finished: RunConfig, family: str) -> None:
    generator, tokenizer = load_generator(finished.folder, family), load_tokenizer(finished.folder)
    settings = {} if family == "autoregressive" else {"num_steps": 2}
    labels, seeds = torch.tensor([0, 1, 2, 0, 1]), [5, 6, 7, 8, 9]
    images = sample_images(generator, tokenizer, labels, seeds, batch_size=4, **settings)
    assert (images.shape, images.dtype) == ((5, 3, 16, 16), torch.uint8)
    some = sample_images(generator, tokenizer, labels[[4, 1]], [9, 6], batch_size=4, **settings)
    assert torch.equal(some, images[[4, 1]])
    other = sample_images(generator, tokenizer, labels, seeds, batch_size=3, **settings)
    assert (other.int() - images.int()).abs().max() <= 1
    assert len(images.unique(dim=0)) == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_another_tokenizer_is_refused(finished: RunConfig, family: str) -> None:
    generator, tokenizer = load_generator(finished.folder, family), load_tokenizer(finished.folder)
    tokenizer.code_fingerprint = "f" * 16
    with pytest.raises(ValueError, match="not ffffffffffffffff: load the tokenizer of its own run"):
        sample_images(generator, tokenizer, None, [0])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_door_writes_pictures_a_grid_and_what_they_are(finished: RunConfig, device: Device, family: str) -> None:
    folder = sample(run=finished, config=CONFIGS[family], family=family, device=device, num=7, seed=2)
    assert folder == finished.folder / "samples" / family
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"{row:06d}.png" for row in range(7)), "grid.png", "samples.json",
    ]  # fmt: skip
    told = json.loads((folder / "samples.json").read_text())
    assert told["labels"] == [0, 1, 2, 0, 1, 2, 0]
    assert told["seeds"] == list(range(2_000_000, 2_000_007))
    generator, tokenizer = load_generator(finished.folder, family), load_tokenizer(finished.folder)
    assert (told["family"], told["generator"], told["tokenizer"]) == (
        family, generator.fingerprint, tokenizer.fingerprint,
    )  # fmt: skip
    images = sample_images(
        generator, tokenizer, torch.tensor(told["labels"]), told["seeds"], batch_size=4, **told["settings"]
    )
    assert np.array_equal(pictures(folder), images.permute(0, 2, 3, 1).numpy())


def test_one_label_and_another_folder(finished: RunConfig, device: Device, tmp_path: Path) -> None:
    config, out = CONFIGS["autoregressive"], tmp_path / "elsewhere"
    folder = sample(
        run=finished, config=config, family="autoregressive", device=device, num=3, label=2, out=out
    )
    assert folder == out
    assert json.loads((out / "samples.json").read_text())["labels"] == [2, 2, 2]
    with pytest.raises(ValueError, match=r"label 3 must be 0 \.\. 2"):
        sample(run=finished, config=config, family="autoregressive", device=device, num=3, label=3)
    with pytest.raises(ValueError, match="num=0 must be at least 1"):
        sample(run=finished, config=config, family="autoregressive", device=device, num=0)


def test_samples_are_reused_and_replaced_by_request(finished: RunConfig, device: Device) -> None:
    settings = {"run": finished, "family": "autoregressive", "device": device, "num": 5}
    folder = sample(config=CONFIGS["autoregressive"], **settings)
    before = (folder / "000000.png").stat().st_mtime_ns
    faster = AutoregressiveSampleConfig(batch_size=2)
    sample(config=dataclasses.replace(CONFIGS["autoregressive"], sample=faster), **settings)
    assert (folder / "000000.png").stat().st_mtime_ns == before
    greedy = AutoregressiveSampleConfig(batch_size=4, temperature=0)
    sample(config=dataclasses.replace(CONFIGS["autoregressive"], sample=greedy), **settings | {"num": 2})
    assert json.loads((folder / "samples.json").read_text())["settings"]["temperature"] == 0
    assert len(pictures(folder)) == 2


def test_an_interrupted_call_continues(
    finished: RunConfig, device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = {"run": finished, "config": CONFIGS["diffusion"], "family": "diffusion", "device": device, "num": 10}
    whole = sample(**settings, out=tmp_path / "whole")
    calls = []

    def interrupt_third(*args, **kwargs) -> torch.Tensor:
        calls.append(args[3])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample_images(*args, **kwargs)

    monkeypatch.setattr("generator.sample.sample_images", interrupt_third)
    with pytest.raises(KeyboardInterrupt):
        sample(**settings)
    assert not (finished.folder / "samples" / "diffusion").exists()
    folder = sample(**settings)
    assert calls[2] == calls[3]
    assert len(calls) == 4
    assert np.array_equal(pictures(folder), pictures(whole))


def test_a_folder_of_other_files_is_left_alone(finished: RunConfig, device: Device, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(ValueError, match=r"holds files but no samples\.json"):
        sample(
            run=finished, config=CONFIGS["diffusion"], family="diffusion", device=device, num=1, out=tmp_path / "mine"
        )
    assert (tmp_path / "mine" / "diary.txt").exists()


def test_load_generator_says_what_is_missing(finished: RunConfig) -> None:
    with pytest.raises(ValueError, match="has not been trained to its end"):
        load_generator(finished.folder / "codes", "diffusion")
    with pytest.raises(ValueError, match="describes 'diffusion', not family='autoregressive'"):
        load_generator(finished.folder / "diffusion", "autoregressive")


def test_grid_has_a_row_for_each_class() -> None:
    assert grid_rows([0, 1, 2, 0, 1, 2, 0]) == ([0, 3, 1, 4, 2, 5], 2)
    assert grid_rows([-1] * 70) == (list(range(64)), 8)
    assert grid_rows([4, 4, 4]) == ([0, 1, 2], 3)
    rows, columns = grid_rows([index % 1000 for index in range(2000)])
    assert (len(rows), columns) == (20, 2)
