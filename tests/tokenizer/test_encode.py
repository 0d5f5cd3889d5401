"""Codes and latents on disk: complete, in order, with views, and not made twice."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from engine.checkpoint import save_model
from engine.config import DataConfig, RunConfig
from engine.device import Device, setup
from engine.flops import forward_flops
from engine.shards import Shards, open_shards
from engine.sources import open_images
from tokenizer.config import TokenizerConfig
from tokenizer.encode import encode_flops, encode_images, view_draws
from tokenizer.model import Tokenizer, code_fingerprint, load_tokenizer, model_card
from tokenizer.smaller import smaller_version

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from pictures import config, make_folder

DATA = DataConfig(source="digits", size=16, workers=0)


@pytest.fixture
def device() -> Device:
    return setup(RunConfig(device="cpu", threads=1))


@pytest.fixture
def run(tmp_path: Path, tokenizer: Tokenizer) -> RunConfig:
    """A run whose tokenizer is there."""
    tokenizer.latent_mean.normal_(generator=torch.Generator().manual_seed(0))
    save_model(tmp_path / "run" / "tokenizer", tokenizer.state_dict(), model_card(tokenizer))
    return RunConfig(name="run", root=str(tmp_path))


def test_both_splits_are_encoded_in_order(run: RunConfig, device: Device) -> None:
    folder = encode_images(run=run, data=DATA, tokenizer=TokenizerConfig(), device=device)
    tokenizer = load_tokenizer(run.folder)
    for split in ("train", "test"):
        images, shards = open_images(DATA, split), open_shards(folder / split, fingerprint=tokenizer.code_fingerprint)
        assert len(shards) == len(images) and np.array_equal(shards.labels, images.labels)
        rows = np.array([0, 7, len(images) - 1])
        stored, pixels = shards.load(rows), images.load(rows)["images"]
        assert torch.equal(stored["codes"], tokenizer.encode(pixels))
        assert torch.allclose(stored["latents"], tokenizer.to_latents(pixels), atol=2e-3)
    assert shards.meta["grid"] == [4, 4] and shards.meta["latent_shape"] == [4, 4, 4]
    assert len(shards.meta["class_names"]) == 10


@pytest.mark.parametrize("crop", ["center", "shift", "random"])
def test_further_views_are_drawn_as_training_draws_them_and_odd_ones_mirrored(
    run: RunConfig, device: Device, crop: Literal["center", "shift", "random"]
) -> None:
    data = dataclasses.replace(DATA, crop=crop, flip=True)
    folder = encode_images(run=run, data=data, tokenizer=TokenizerConfig(views=3), device=device)
    tokenizer, images = load_tokenizer(run.folder), open_images(data, "train")
    shards, rows = open_shards(folder / "train"), np.arange(3)
    assert len(shards.views) == 3 and open_shards(folder / "test").views == ("original",)
    for view in (1, 2):
        draws = view_draws(len(images), view)[rows]
        assert bool((draws[:, 0] >= 0.5).all()) == (view == 1)
        stored = shards.load(rows, np.full((3, 4), view / 3 + 0.01))["codes"]
        assert torch.equal(stored, tokenizer.encode(images.load(rows, draws)["images"]))
    if crop == "center":
        mirrored = shards.load(rows, np.full((3, 4), 1 / 3 + 0.01))["codes"]
        assert torch.equal(mirrored, tokenizer.encode(images.load(rows)["images"].flip(-1)))


def test_what_is_there_is_left_alone_and_what_is_stale_made_anew(
    run: RunConfig, tokenizer: Tokenizer, device: Device
) -> None:
    def encoded(**settings: int) -> int:
        folder = encode_images(run=run, data=DATA, tokenizer=TokenizerConfig(**settings), device=device)
        return (folder / "train" / "meta.json").stat().st_mtime_ns

    first = encoded()
    assert encoded() == first
    other_views = encoded(views=2)
    assert other_views != first
    tokenizer.latent_mean += 1
    save_model(run.folder / "tokenizer", tokenizer.state_dict(), model_card(tokenizer))
    assert encoded(views=2) != other_views
    assert open_shards(run.folder / "codes" / "test").meta["tokenizer_fingerprint"] == code_fingerprint(tokenizer)


def test_the_smaller_version_of_each_view_is_encoded_beside_it(run: RunConfig, device: Device) -> None:
    data = dataclasses.replace(DATA, flip=True)
    settings = TokenizerConfig(views=2, low_resolution=4)
    folder = encode_images(run=run, data=data, tokenizer=settings, device=device)
    tokenizer, images, shards = load_tokenizer(run.folder), open_images(data, "train"), open_shards(folder / "train")
    rows = np.array([0, 9])
    for view, draws in ((0, None), (1, view_draws(len(images), 1)[rows])):
        stored = shards.load(rows, np.full((2, 4), view / 2 + 0.1))["smaller"]
        version = smaller_version(images.load(rows, draws)["images"], 4)
        assert torch.allclose(stored, tokenizer.to_latents(version), atol=2e-3)
    assert not torch.allclose(stored, shards.load(rows, np.full((2, 4), 0.6))["latents"], atol=0.1)
    assert shards.identity()["low_resolution"] == 4
    assert open_shards(folder / "test").load(rows)["smaller"].shape == (2, 4, 4, 4)


def test_another_factor_and_none_encode_anew(run: RunConfig, device: Device) -> None:
    def encoded(factor: int | None) -> int:
        settings = TokenizerConfig(low_resolution=factor)
        folder = encode_images(run=run, data=DATA, tokenizer=settings, device=device, splits=["test"])
        return (folder / "test" / "meta.json").stat().st_mtime_ns

    stamps = [encoded(factor) for factor in (None, 2, 2, 4, None)]
    assert stamps[1] == stamps[2] and len(set(stamps)) == 4
    shards = open_shards(run.folder / "codes" / "test")
    assert "low_resolution" not in shards.meta and "smaller" not in shards.load(np.array([0]))
    with pytest.raises(ValueError, match=r"tokenizer\.low_resolution=3 must divide data\.size=16: use one of 2, 4, 8"):
        encoded(3)
    with pytest.raises(ValueError, match=r"tokenizer\.low_resolution=1 must be at least 2"):
        encoded(1)


def test_captions_go_with_the_images_that_can_be_read(run: RunConfig, tmp_path: Path, device: Device) -> None:
    def encoded() -> Shards:
        tokenizer = TokenizerConfig(encode_batch_size=2)
        folder = encode_images(run=run, data=data, tokenizer=tokenizer, device=device, splits=["train"])
        return open_shards(folder / "train")

    pictures = tmp_path / "pictures"
    make_folder(pictures, {".": [1, 2, 3, 4, 5]})
    for level in range(1, 6):
        (pictures / f"{level:03d}.txt").write_text(f"level {level}\ngrey {level}")
    (pictures / "002.png").write_bytes(b"no picture")
    data = config("folder", pictures, caption_column="txt", test_fraction=0.0, size=16)
    with pytest.warns(UserWarning, match="unreadable"):
        shards = encoded()
    assert shards.captions == [f"level {level}\ngrey {level}" for level in (1, 3, 4, 5)]
    before = shards.identity()
    assert encoded().identity() == before
    (pictures / "005.txt").write_text("level five")
    with pytest.warns(UserWarning, match="unreadable"):
        shards = encoded()
    assert shards.captions is not None and shards.captions[-1] == "level five"
    after = shards.identity()
    assert after.pop("captions") != before.pop("captions") and after == before


def test_splits_that_nobody_reads_are_left_out(run: RunConfig, device: Device) -> None:
    folder = encode_images(run=run, data=DATA, tokenizer=TokenizerConfig(), device=device, splits=["test"])
    assert [path.name for path in folder.iterdir()] == ["test"]


def test_encoding_costs_a_forward_pass_without_the_decoder(tokenizer: Tokenizer) -> None:
    size, length = tokenizer.image_size, tokenizer.length
    whole = forward_flops(tokenizer, torch.empty(1, 3, size, size))
    decoder = forward_flops(tokenizer.decoder, torch.empty(1, length, tokenizer.quantizer.latent_dim))
    assert encode_flops(tokenizer) == whole - decoder > 0


def test_another_image_size_is_refused(run: RunConfig, device: Device) -> None:
    with pytest.raises(ValueError, match=r"data\.size=32, but the tokenizer in .* was trained at 16 pixels"):
        encode_images(run=run, data=DataConfig(size=32), tokenizer=TokenizerConfig(), device=device)
