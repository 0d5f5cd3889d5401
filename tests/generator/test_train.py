"""The autoregressive task and the door that trains either family."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.batches import StepRandom
from engine.checkpoint import load_model
from engine.config import DataConfig, RunConfig, TrainConfig
from engine.device import Device
from engine.optim import learning_rate
from engine.shards import ShardWriter, open_shards
from engine.snapshots import snapshots
from engine.sources import open_images
from generator.autoregressive import VIM
from generator.autoregressive_task import AutoregressiveTask
from generator.card import family_of, generator_card
from generator.condition import spread_labels
from generator.config import (
    AutoregressiveConfig,
    AutoregressiveModelConfig,
    AutoregressiveSampleConfig,
    DenoiserModelConfig,
    DiffusionConfig,
    DiffusionSampleConfig,
    OrderConfig,
)
from generator.order import draw_orders
from generator.sample import load_generator
from generator.train import train_generator
from tokenizer.config import QuantizerConfig, TokenizerConfig, TokenizerModelConfig, TowerConfig
from tokenizer.encode import encode_images
from tokenizer.model import Tokenizer, load_tokenizer
from tokenloom.experiment import load_experiment

TRAIN = TrainConfig(
    steps=60, batch_size=32, learning_rate=1e-2, ema=0.9, log_every=20, preview_every=60, checkpoint_every=60
)
MODEL = AutoregressiveModelConfig(preset="tiny", depth=2, width=32, heads=2, dropout=0.0)
AUTOREGRESSIVE = AutoregressiveConfig(model=MODEL, train=TRAIN)
DIFFUSION = DiffusionConfig(
    model=DenoiserModelConfig(preset="tiny", depth=2, width=32, heads=2),
    train=TRAIN,
    sample=DiffusionSampleConfig(num_steps=4),
)
DATA = DataConfig(workers=0)
DIGITS = DataConfig(size=16, crop="shift", flip=True, workers=0)
TOWER = TowerConfig(blocks=1, width=16, heads=2, mlp=32)


def make_task(run: RunConfig, config: AutoregressiveConfig = AUTOREGRESSIVE) -> AutoregressiveTask:
    torch.manual_seed(0)
    shards, test_shards = (open_shards(run.folder / "codes" / split) for split in ("train", "test"))
    tokenizer = load_tokenizer(run.folder)
    card = generator_card(config, shards, tokenizer)
    return AutoregressiveTask(config=config, card=card, source=shards, test_shards=test_shards, tokenizer=tokenizer)


def with_model(**changes: Any) -> AutoregressiveConfig:
    return dataclasses.replace(AUTOREGRESSIVE, model=dataclasses.replace(MODEL, **changes))


def records(run: RunConfig, family: str) -> list[dict]:
    return [json.loads(line) for line in (run.folder / family / "metrics.jsonl").read_text().splitlines()]


def test_loss_is_the_mean_nats_per_token_with_labels_dropped(run: RunConfig) -> None:
    task = make_task(run, with_model(label_dropout=0.5))
    batch = open_shards(run.folder / "codes" / "train").load(torch.arange(20).numpy())
    batch["labels"][0] = -1
    loss = task.step(batch, StepRandom(0, 0, 20))["loss"]
    dropped = StepRandom(0, 0, 20).uniform() < 0.5
    assert 0 < dropped.sum() < 20
    labels = torch.where(dropped | (batch["labels"] < 0), 3, batch["labels"])
    logits = task.network(batch["codes"], labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits.transpose(1, 2), batch["codes"]))


def test_validation_counts_every_held_out_token_once(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(run)
    task.network.eval()
    batch = task.test_shards.load(torch.arange(24).numpy())
    nats = task.generator.nll(batch["codes"], batch["labels"])
    monkeypatch.setattr("generator.autoregressive_task.VALIDATION_BATCH", 7)
    with torch.inference_mode():
        figures = task.validate()
    assert figures["nll"] == pytest.approx(nats.mean().item() / 16, rel=1e-5)
    assert figures["bits_per_image"] == pytest.approx(nats.mean().item() / math.log(2), rel=1e-5)
    shares = torch.bincount(batch["codes"].flatten(), minlength=32) / batch["codes"].numel()
    assert figures["unigram_entropy"] == pytest.approx(torch.special.entr(shares).sum().item(), rel=1e-5)
    assert figures["nll_over_unigram"] == pytest.approx(figures["nll"] / figures["unigram_entropy"])


def test_validation_of_part_of_the_test_set_spreads_over_it(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("generator.autoregressive_task.VALIDATION_IMAGES", 6)
    task = make_task(run)
    codes = torch.cat([codes for codes, _ in task._test_batches()])
    assert torch.equal(codes, task.test_shards.load(torch.arange(0, 24, 4).numpy())["codes"])


def test_preview_shows_samples_and_how_the_first_of_them_were_made(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(run)
    calls: list[int] = []
    advance = VIM.advance
    monkeypatch.setattr(VIM, "advance", lambda *arguments: calls.append(1) or advance(*arguments))
    with torch.no_grad():
        pictures = task.preview()
    assert len(calls) == 16  # one sequence of codes makes both
    samples, strip = pictures["samples"], pictures["partial"].unflatten(0, (8, 8))
    assert (samples.shape, samples.dtype) == ((16, 3, 16, 16), torch.uint8)
    assert torch.equal(strip[:, -1], samples[:8])
    for stage, rows in enumerate(([4], [4, 8], [8]), start=1):  # of 4 rows of cells, two stages make one
        assert (strip[:, stage, :, rows[-1] + 4 :] == 128).all()
    assert (strip[:, 1, :, :4] != 128).any()


def test_a_preview_of_bf16_sampling_decodes_with_the_network_in_training(run: RunConfig) -> None:
    sample = AutoregressiveSampleConfig(precision="bf16", guidance=2.0)
    assert make_task(run, dataclasses.replace(AUTOREGRESSIVE, sample=sample)).preview()["samples"].shape[0] == 16


@pytest.mark.parametrize("length", [1, 3, 16])
def test_short_sequences_have_eight_stages_too(run: RunConfig, length: int) -> None:
    """A grid of one cell, or of three codes in each cell."""
    patch = 16 if length < 16 else 4
    model = TokenizerModelConfig(patch_size=patch, vocab_size=8, code_dim=4, encoder=TOWER, decoder=TOWER)
    quantizer = QuantizerConfig(kind="residual", depth=3) if length == 3 else QuantizerConfig()
    tokenizer = Tokenizer(model, quantizer, image_size=16).eval()
    assert tokenizer.length == length
    meta = {"grid": list(tokenizer.grid), "vocab_size": 8, "latent_shape": list(tokenizer.latent_shape)}
    with ShardWriter(run.folder / "few", views=("original",), vocab_size=8) as writer:
        writer.append(labels=torch.arange(4) % 3, codes=torch.zeros(4, 1, length, dtype=torch.int64))
        writer.close(meta | {"tokenizer_fingerprint": "", "class_names": ["a", "b", "c"], "images": {}})
    shards = open_shards(run.folder / "few")
    card = generator_card(AUTOREGRESSIVE, shards, tokenizer)
    task = AutoregressiveTask(config=AUTOREGRESSIVE, card=card, source=shards, test_shards=shards, tokenizer=tokenizer)
    assert task.preview()["partial"].shape == (64, 3, 16, 16)
    with torch.no_grad():
        assert task.validate()["nll_over_unigram"] == math.inf  # all codes are one


def test_spread_labels_rise_evenly() -> None:
    assert spread_labels(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert spread_labels(4, 100).tolist() == [0, 25, 50, 75]
    assert spread_labels(2, 0).tolist() == [-1, -1]


def test_guidance_without_a_null_label_is_refused_before_training(run: RunConfig) -> None:
    config = dataclasses.replace(with_model(label_dropout=0.0), sample=AutoregressiveSampleConfig(guidance=2.0))
    with pytest.raises(ValueError, match=r"autoregressive\.sample\.guidance=2\.0"):
        make_task(run, config)


def test_dropping_every_label_trains_without_classes(run: RunConfig) -> None:
    task = make_task(run, with_model(label_dropout=1.0))
    assert task.generator.num_classes == 0
    batch = task.test_shards.load(torch.arange(4).numpy())
    assert task.step(batch, StepRandom(0, 0, 4))["loss"].isfinite()
    with torch.inference_mode():
        assert task.validate()["nll"] > 0


def test_labels_beyond_the_class_names_are_refused(run: RunConfig) -> None:
    shards = open_shards(run.folder / "codes" / "train")
    shards.meta["class_names"] = ["a", "b"]
    with pytest.raises(ValueError, match=r"label 2 must be 0 \.\. 1"):
        generator_card(AUTOREGRESSIVE, shards, load_tokenizer(run.folder))


def test_training_beats_the_unigram_entropy_and_ends_with_a_model(run: RunConfig, device: Device) -> None:
    folder = train_generator(run=run, data=DATA, config=AUTOREGRESSIVE, family="autoregressive", device=device)
    assert folder == run.folder / "autoregressive"
    last = [record for record in records(run, "autoregressive") if "validation/nll" in record][-1]
    assert last["validation/nll"] < 0.6 * last["validation/unigram_entropy"]
    assert list((folder / "previews").glob("*samples.png"))
    card, _ = load_model(folder)
    assert (card["family"], card["num_classes"], card["grid"], card["vocab_size"]) == ("autoregressive", 3, [4, 4], 32)
    assert card["tokenizer_fingerprint"] == load_tokenizer(run.folder).code_fingerprint
    codes = load_generator(run.folder, "autoregressive").sample(torch.tensor([0, 1, 2]), [0, 1, 2], temperature=0)
    assert (codes[:, 1:] == codes[:, :-1] + 1).float().mean() > 0.8
    assert codes[:, 0].tolist() == [0, 7, 14]


def test_diffusion_trains_through_the_same_door(run: RunConfig, device: Device) -> None:
    folder = train_generator(run=run, data=DATA, config=DIFFUSION, family="diffusion", device=device)
    generator = load_generator(folder, "diffusion")
    assert (generator.family, generator.num_classes, generator.class_names) == ("diffusion", 3, ("a", "b", "c"))
    assert generator.sample(torch.tensor([0]), [0], num_steps=4).shape == (1, 4, 4, 4)


def test_the_same_command_again_gives_the_same_model(run: RunConfig, device: Device) -> None:
    short = dataclasses.replace(AUTOREGRESSIVE, train=dataclasses.replace(TRAIN, steps=3))
    settings = {"run": run, "data": DATA, "family": "autoregressive", "device": device}
    first = load_model(train_generator(config=short, **settings))[0]["fingerprint"]
    warmer = dataclasses.replace(short, sample=AutoregressiveSampleConfig(temperature=0.5))
    assert load_model(train_generator(config=warmer, **settings))[0]["fingerprint"] == first
    other = dataclasses.replace(short, model=dataclasses.replace(MODEL, width=64))
    with pytest.raises(ValueError, match=r"autoregressive\.model\.width: 32 -> 64"):
        train_generator(config=other, **settings)


@pytest.mark.parametrize("config", [AUTOREGRESSIVE, DIFFUSION], ids=["autoregressive", "diffusion"])
def test_snapshots_of_the_training_can_be_sampled(run: RunConfig, device: Device, config: Any) -> None:
    training = dataclasses.replace(TRAIN, steps=6, snapshot_every=4, ema_widths=(0.05, 0.1), preview_every=0)
    config, family = dataclasses.replace(config, train=training), family_of(config)
    train_generator(run=run, data=DATA, config=config, family=family, device=device)
    early, last, model = (load_generator(run.folder, family, snapshot=step) for step in (4, 6, None))
    assert last.fingerprint == model.fingerprint != early.fingerprint
    assert early.sample(None, [0]).shape == model.sample(None, [0]).shape
    power = load_generator(run.folder, family, ema_width=0.07)
    assert power.fingerprint not in (early.fingerprint, model.fingerprint)


def test_a_run_of_before_snapshots_came_is_still_finished(run: RunConfig, device: Device) -> None:
    short = dataclasses.replace(AUTOREGRESSIVE, train=dataclasses.replace(TRAIN, steps=3))
    settings = {"run": run, "data": DATA, "family": "autoregressive", "device": device}
    folder = train_generator(config=short, **settings)
    for name, identity_of in (("identity.json", lambda told: told), ("model.json", lambda told: told["identity"])):
        told = json.loads((folder / name).read_text())
        for key in ("snapshot_every", "ema_widths"):
            del identity_of(told)["autoregressive"]["train"][key]
        (folder / name).write_text(json.dumps(told))
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    train_generator(config=short, **settings)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    longer = dataclasses.replace(short, train=dataclasses.replace(TRAIN, steps=5, snapshot_every=5))
    train_generator(config=longer, **settings)
    assert list(snapshots(folder)) == [5]
    widths = dataclasses.replace(longer, train=dataclasses.replace(longer.train, ema_widths=(0.1,)))
    with pytest.raises(ValueError, match=r"autoregressive\.train\.ema_widths: \[\] -> \[0\.1\]"):
        train_generator(config=widths, **settings)


def test_codes_of_another_tokenizer_are_refused(run: RunConfig, device: Device) -> None:
    meta = run.folder / "codes" / "train" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"tokenizer_fingerprint": "0" * 16}))
    with pytest.raises(ValueError, match="made by tokenizer 0000000000000000"):
        train_generator(run=run, data=DATA, config=AUTOREGRESSIVE, family="autoregressive", device=device)


def test_a_section_of_the_other_family_is_refused(run: RunConfig, device: Device) -> None:
    with pytest.raises(ValueError, match="family='diffusion' does not fit the section AutoregressiveConfig"):
        train_generator(run=run, data=DATA, config=AUTOREGRESSIVE, family="diffusion", device=device)


# Codes on the fly


def on_the_fly(steps: int = 4, **changes: Any) -> AutoregressiveConfig:
    train = TrainConfig(steps=steps, batch_size=8, decay="constant", preview_every=4, checkpoint_every=2)
    model = dataclasses.replace(MODEL, dropout=0.1)
    return AutoregressiveConfig(codes="on_the_fly", model=model, train=train, **changes)


def with_codes(run: RunConfig, data: DataConfig, device: Device) -> RunConfig:
    """The codes of the digits instead of the counting ones: of the test split alone."""
    shutil.rmtree(run.folder / "codes")
    encode_images(run=run, data=data, tokenizer=TokenizerConfig(), device=device, splits=["test"])
    return run


@pytest.mark.parametrize("bf16", [False, True])
def test_codes_on_the_fly_are_those_of_the_cache(run: RunConfig, device: Device, bf16: bool) -> None:
    """Whatever the precision of the training step around them."""
    encode_images(run=run, data=DIGITS, tokenizer=TokenizerConfig(), device=device)
    shards, images, rows = open_shards(run.folder / "codes" / "train"), open_images(DIGITS, "train"), np.arange(64)
    tokenizer = load_tokenizer(run.folder)
    card = generator_card(on_the_fly(), images, tokenizer)
    assert card == generator_card(on_the_fly(), shards, tokenizer) and card["num_classes"] == 10
    cached, task = (
        AutoregressiveTask(config=config, card=card, source=shards, test_shards=shards, tokenizer=tokenizer)
        for config in (AUTOREGRESSIVE, on_the_fly())
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        found = task._codes(images.load(rows))
    assert torch.equal(found, cached._codes(shards.load(rows))) and len(found.unique()) > 1
    moved = images.load(rows, np.full((64, 4), 0.99))
    assert not torch.equal(task._codes(moved), found)


def test_training_on_the_fly_needs_no_codes_but_the_test_splits(run: RunConfig, device: Device) -> None:
    settings = {"data": DIGITS, "family": "autoregressive", "device": device}
    folder = train_generator(run=with_codes(run, DIGITS, device), config=on_the_fly(), **settings)
    card, _ = load_model(folder)
    assert card["identity"]["codes"] == {
        "tokenizer_fingerprint": load_tokenizer(run.folder).code_fingerprint,
        "images": open_images(DIGITS, "train").content(),
        "augmentation": {"crop": "shift", "flip": True},
    }
    assert (card["num_classes"], card["codes"]) == (10, "on_the_fly")
    assert records(run, "autoregressive")[-1]["validation/nll"] > 0
    before = (folder / "model.json").stat().st_mtime_ns
    train_generator(run=run, config=on_the_fly(), **settings)
    assert (folder / "model.json").stat().st_mtime_ns == before
    for data, told in (
        (dataclasses.replace(DIGITS, flip=False), r"codes\.augmentation\.flip: True -> False"),
        (dataclasses.replace(DIGITS, size=32), r"data\.size=32, but the tokenizer in .* was trained at 16 pixels"),
    ):
        with pytest.raises(ValueError, match=told):
            train_generator(run=run, config=on_the_fly(), **{**settings, "data": data})
    cached = dataclasses.replace(on_the_fly(), codes="cached")
    with pytest.raises(ValueError, match="codes/train: no complete codes"):
        train_generator(run=run, config=cached, **settings)


def test_training_on_the_fly_resumes_to_the_bit(run: RunConfig, tmp_path: Path, device: Device) -> None:
    with_codes(run, DIGITS, device)
    shutil.copytree(run.folder, tmp_path / "twin")
    settings = {"data": DIGITS, "family": "autoregressive", "device": device}
    train_generator(run=run, config=on_the_fly(2), **settings)
    resumed = train_generator(run=run, config=on_the_fly(4), **settings)
    twin = dataclasses.replace(run, name="twin")
    straight = train_generator(run=twin, config=on_the_fly(4), **settings)
    _, first = load_model(resumed)
    _, second = load_model(straight)
    assert all(torch.equal(first[name], second[name]) for name in first)


# The order of codes

RANDOM = OrderConfig(kind="random", anneal_start=0.25, anneal_end=0.75)


def test_the_raster_draws_no_more_than_the_labels_that_are_dropped(run: RunConfig) -> None:
    drawn: list[tuple[int, ...]] = []

    class Watched(StepRandom):
        def uniform(self, *shape: int) -> torch.Tensor:
            drawn.append(shape)
            return super().uniform(*shape)

    batch = open_shards(run.folder / "codes" / "train").load(np.arange(8))
    assert make_task(run).step(batch, Watched(0, 30, 8)).keys() == {"loss"}
    assert drawn == [()]
    task = make_task(run, dataclasses.replace(AUTOREGRESSIVE, order=RANDOM))
    for step, draws, share in ((0, 3, 1.0), (30, 3, 0.5), (45, 1, 0.0)):
        drawn.clear()
        assert task.step(batch, Watched(0, step, 8))["random_order"] == pytest.approx(share)
        assert len(drawn) == draws and drawn[0] == ()


def test_targets_follow_the_order(run: RunConfig) -> None:
    task = make_task(run, dataclasses.replace(with_model(label_dropout=0.0), order=RANDOM))
    batch, rng = open_shards(run.folder / "codes" / "train").load(np.arange(8)), StepRandom(0, 30, 8)
    rng.uniform()
    order = draw_orders(rng.uniform(), rng.uniform(16), 0.5)
    assert 0 < (order == torch.arange(16)).all(1).sum() < 8
    logits = task.network(batch["codes"], batch["labels"], order)
    logits = torch.zeros_like(logits).scatter(1, order[..., None].expand_as(logits), logits)  # back on the grid
    expected = F.cross_entropy(logits.transpose(1, 2), batch["codes"])
    torch.testing.assert_close(task.step(batch, StepRandom(0, 30, 8))["loss"], expected)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_network_trained_in_random_orders_ends_as_a_plain_one(run: RunConfig, device: Device, ema: float) -> None:
    train = dataclasses.replace(TRAIN, ema=ema)
    config = dataclasses.replace(AUTOREGRESSIVE, order=RANDOM, train=train)
    folder = train_generator(run=run, data=DATA, config=config, family="autoregressive", device=device)
    card, weights = load_model(folder)
    assert not any("source" in name for name in weights) and card["order"]["kind"] == "random"
    lines = records(run, "autoregressive")
    shares = [line["random_order"] for line in lines if "random_order" in line]  # of 20 steps each
    assert shares == pytest.approx([29.5 / 30, 15.5 / 30, 0.75 / 30])
    last = [line for line in lines if "validation/nll" in line][-1]
    assert last["validation/nll"] < 0.8 * last["validation/unigram_entropy"]
    shards = open_shards(run.folder / "codes" / "test")
    batch = shards.load(np.arange(24))
    nats = load_generator(folder, "autoregressive").nll(batch["codes"], batch["labels"]).mean() / 16
    assert nats == pytest.approx(last["validation/nll"], rel=1e-5)


def test_the_large_configuration_follows_the_published_learning_rate() -> None:
    """Warm-up over 5,000 steps to 4.5e-4, exponential from 80,000 to 1e-5 at 450,000 (ViT-VQGAN; second-hand)."""
    path = Path(__file__).parents[2] / "configs" / "imagenet256.yaml"
    section = load_experiment(["--config", str(path)]).autoregressive
    assert section is not None and section.train.steps == 450_000
    for step in (0, 1_000, 4_999, 5_000, 79_999, 80_000, 100_000, 265_000, 449_999, 450_000):
        decayed = 4.5e-4 * (1e-5 / 4.5e-4) ** (max(0, step - 80_000) / 370_000)
        expected = 4.5e-4 * (step + 1) / 5_000 if step < 5_000 else decayed
        assert learning_rate(step, section.train) == pytest.approx(expected, rel=1e-9)
