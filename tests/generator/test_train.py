"""The autoregressive task and the door that trains either family."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

from engine.batches import StepRandom
from engine.checkpoint import load_model
from engine.config import DataConfig, RunConfig, TrainConfig
from engine.device import Device
from engine.shards import open_shards
from generator.autoregressive_task import AutoregressiveTask
from generator.card import generator_card
from generator.condition import spread_labels
from generator.config import (
    AutoregressiveConfig,
    AutoregressiveModelConfig,
    AutoregressiveSampleConfig,
    DenoiserModelConfig,
    DiffusionConfig,
    DiffusionSampleConfig,
)
from generator.sample import load_generator
from generator.train import train_generator
from tokenizer.model import load_tokenizer

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


def make_task(run: RunConfig, config: AutoregressiveConfig = AUTOREGRESSIVE) -> AutoregressiveTask:
    torch.manual_seed(0)
    shards, test_shards = (open_shards(run.folder / "codes" / split) for split in ("train", "test"))
    return AutoregressiveTask(
        config=config, shards=shards, test_shards=test_shards, tokenizer=load_tokenizer(run.folder)
    )


def with_model(**changes: float) -> AutoregressiveConfig:
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


def test_validation_of_part_of_the_test_set_spreads_over_it(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("generator.autoregressive_task.VALIDATION_IMAGES", 6)
    task = make_task(run)
    codes = torch.cat([codes for codes, _ in task._test_batches()])
    assert torch.equal(codes, task.test_shards.load(torch.arange(0, 24, 4).numpy())["codes"])


def test_preview_decodes_a_few_samples_of_each_class(run: RunConfig) -> None:
    pictures = make_task(run).preview()["samples"]
    assert (pictures.shape, pictures.dtype) == ((16, 3, 16, 16), torch.uint8)


def test_spread_labels_rise_evenly() -> None:
    assert spread_labels(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert spread_labels(4, 100).tolist() == [0, 25, 50, 75]
    assert spread_labels(2, 0).tolist() == [-1, -1]


def test_guidance_without_a_null_label_is_refused_before_training(run: RunConfig) -> None:
    config = dataclasses.replace(
        with_model(label_dropout=0.0), sample=AutoregressiveSampleConfig(guidance=2.0)
    )
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


def test_codes_of_another_tokenizer_are_refused(run: RunConfig, device: Device) -> None:
    meta = run.folder / "codes" / "train" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"tokenizer_fingerprint": "0" * 16}))
    with pytest.raises(ValueError, match="made by tokenizer 0000000000000000"):
        train_generator(run=run, data=DATA, config=AUTOREGRESSIVE, family="autoregressive", device=device)


def test_a_section_of_the_other_family_is_refused(run: RunConfig, device: Device) -> None:
    with pytest.raises(ValueError, match="family='diffusion' does not fit the section AutoregressiveConfig"):
        train_generator(run=run, data=DATA, config=AUTOREGRESSIVE, family="diffusion", device=device)
