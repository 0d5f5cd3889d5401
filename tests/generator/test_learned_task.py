"""The training of a network along with its schedule: the loss, what is told, resuming, sampling."""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.batches import StepRandom
from engine.checkpoint import load_model
from engine.config import DataConfig, RunConfig, TrainConfig
from engine.device import Device, setup
from engine.shards import ShardWriter, open_shards
from generator.config import (
    ConditionConfig,
    CurriculumConfig,
    DenoiserModelConfig,
    DiffusionConfig,
    DiffusionSampleConfig,
    ScheduleConfig,
)
from generator.learned_config import LearnedScheduleConfig
from generator.learned_task import CURVE_TIMES, CURVES, LearnedScheduleTask, gamma_curves
from generator.path import noised, variance_preserving
from generator.sample import load_generator
from generator.train import train_generator
from tokenizer.model import load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import forked
from training import Silent, records

TRAIN = TrainConfig(
    steps=4, batch_size=8, learning_rate=1e-2, decay="constant", ema=0.9, log_every=2, preview_every=4,
    checkpoint_every=2,
)  # fmt: skip
MODEL = DenoiserModelConfig(depth=1, width=32, heads=2)
MAPS = DiffusionSampleConfig(solver="ddpm", steps="time", num_steps=3, batch_size=10)
DATA = DataConfig(workers=0)
KINDS = ("scalar", "channel", "told", "pixel")


def config(per: str, **changes: Any) -> DiffusionConfig:
    """That of a schedule; `told` is one of each channel that reads an image."""
    reads = per in ("pixel", "told")
    learned = LearnedScheduleConfig(
        per="channel" if per == "told" else per,
        hidden=8,
        **({"channels": 8} if reads else {}),  # type: ignore[arg-type]
    )
    kind: Any = "image" if reads else "class"
    settings: dict[str, Any] = {
        "model": MODEL, "condition": ConditionConfig(kind=kind), "target": "eps", "train": TRAIN, "sample": MAPS,
        "schedule": ScheduleConfig(kind="learned", learned=learned),
    }  # fmt: skip
    return DiffusionConfig(**{**settings, **changes})


@pytest.fixture
def told(run: RunConfig) -> RunConfig:
    """A run whose codes have smaller images too: the mean of each channel, told to all of it."""
    for split in ("train", "test"):
        folder = run.folder / "codes" / split
        shards = open_shards(folder)
        batch = shards.load(np.arange(len(shards)))
        smaller = batch["latents"].mean((2, 3), keepdim=True).expand_as(batch["latents"])
        keys = ("tokenizer_fingerprint", "grid", "vocab_size", "latent_shape", "class_names", "images")
        meta = {**{key: shards.meta[key] for key in keys}, "low_resolution": 4}
        shutil.rmtree(folder)
        writer = ShardWriter(folder, views=("original",), vocab_size=meta["vocab_size"])
        writer.append(
            labels=batch["labels"], codes=batch["codes"][:, None], latents=batch["latents"][:, None],
            smaller=smaller[:, None],
        )  # fmt: skip
        writer.close(meta)
    return run


def make_task(run: RunConfig, per: str, **changes: Any) -> LearnedScheduleTask:
    torch.manual_seed(0)
    train, test = (open_shards(run.folder / "codes" / split) for split in ("train", "test"))
    tokenizer = load_tokenizer(run.folder)
    return LearnedScheduleTask(config=config(per, **changes), shards=train, test_shards=test, tokenizer=tokenizer)


def batch_of(run: RunConfig, rows: int = 8) -> dict[str, Tensor]:
    return open_shards(run.folder / "codes" / "train").load(np.arange(rows))


@pytest.mark.parametrize("per", KINDS)
def test_the_loss_is_the_error_at_the_learned_levels_and_what_holds_the_schedule(told: RunConfig, per: str) -> None:
    task, batch = make_task(told, per), batch_of(told)
    task.modules["network"] = network = Silent()
    figures = task.step(batch, StepRandom(0, 3, 8))

    rng, latents = StepRandom(0, 3, 8), batch["latents"].float()
    u, eps = rng.uniform(), rng.normal(*latents.shape[1:])
    dropped = rng.uniform() < MODEL.label_dropout
    given = batch["smaller"].float() if per in ("pixel", "told") else batch["labels"]
    condition = task.condition.drop(given, dropped)
    rates = task.schedule.rates(condition)
    logsnr = task.schedule.logsnr(1 - u, rates)
    held = task.schedule.penalties(task.schedule.course(1 - u, rates), rates, latents)
    error = eps.square().mean()
    torch.testing.assert_close(figures["error"], error)
    expected = error + 2 * held.constraint.mean() + 2 * held.prior.mean() + 0.002 * held.roughness.mean()
    torch.testing.assert_close(figures["loss"], expected)
    seen, asked, told_of = network.calls[0]
    assert asked.shape == ((8,) if per == "scalar" else latents.shape)
    torch.testing.assert_close(asked, logsnr)
    torch.testing.assert_close(seen, noised(latents, eps, logsnr))
    assert torch.equal(told_of, condition)
    torch.testing.assert_close(figures["mean_logsnr"], logsnr.mean())
    inside = (20 * (1 - u)).long() == torch.arange(20)[:, None]  # [N, B]
    torch.testing.assert_close(figures["draws_by_cluster"], inside.float().mean(1))


def test_the_error_reaches_the_schedule_and_the_rates_through_the_levels(told: RunConfig) -> None:
    """A network that is not silent: its output depends on what it sees, and on the map."""
    task = make_task(told, "pixel")
    with torch.no_grad():
        for parameter in task.network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    latents, condition = batch_of(told)["latents"].float(), batch_of(told)["smaller"].float()
    logsnr = task.schedule(torch.full((8,), 0.5), condition)
    task.errors_at(latents, condition, logsnr, torch.ones_like(latents)).mean().backward()
    assert task.schedule.of_image is not None
    for part in (task.schedule.elapsed.heights, task.schedule.of_image.first.weight):
        assert part.grad is not None and float(part.grad.abs().sum()) > 0
    assert task.schedule.speed.heights.grad is None  # which the constraint alone moves


def test_the_functions_of_time_learn_faster_and_all_that_is_trained_is_in_one_group(told: RunConfig) -> None:
    task = make_task(told, "pixel")
    groups = task.optimizers["network"].param_groups
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in task.network.parameters())
    fast = {id(parameter) for part in (task.schedule.elapsed, task.schedule.speed) for parameter in part.parameters()}
    assert {id(parameter) for parameter in groups[-1]["params"]} == fast
    assert groups[-1]["peak_lr"] == pytest.approx(0.1) and groups[-1]["weight_decay"] == 0
    assert {group["peak_lr"] for group in groups[:-1]} == {0.01}


@pytest.mark.parametrize("per", KINDS)
def test_a_trained_network_brings_its_schedule_and_samples_row_by_row(
    told: RunConfig, device: Device, per: str
) -> None:
    folder = train_generator(run=told, data=DATA, config=config(per), family="diffusion", device=device)
    _, weights = load_model(folder)
    generator = load_generator(folder, "diffusion")
    schedule = generator.network.learned_schedule
    assert schedule is not None
    assert torch.equal(weights["learned_schedule.elapsed.heights"], schedule.elapsed.heights)
    assert not torch.equal(schedule.elapsed.heights, make_task(told, per).schedule.elapsed.heights)
    rows = batch_of(told)["smaller"].float() if per in ("pixel", "told") else batch_of(told)["labels"]
    three = generator.sample(rows[:3], [5, 6, 7], **dataclasses.asdict(MAPS))
    one = generator.sample(rows[1:2], [6], **dataclasses.asdict(MAPS))
    assert three.shape == (3, 4, 4, 4) and bool(three.isfinite().all())
    torch.testing.assert_close(one[0], three[1])
    assert not torch.allclose(generator.sample(rows[:1], [6], **dataclasses.asdict(MAPS))[0], three[1])
    assert generator.features(three, ["block1"])["block1"].shape == (3, 32)
    lines = [line for line in records(folder) if "loss" in line]
    taken = lines[-1]["learned_schedule/gamma"]
    assert tuple(taken["edges"]) == CURVE_TIMES and 0 < sum(taken["shares"]) < 1
    assert lines[-1]["learned_schedule/residual"] < lines[0]["learned_schedule/residual"]
    assert records(folder)[-1]["validation/loss"] > records(folder)[-1]["validation/error"] > 0


def test_sampling_by_its_own_time_asks_a_scalar_schedule_for_its_log_snrs(told: RunConfig) -> None:
    generator = make_task(told, "scalar").generator
    schedule = generator.network.learned_schedule
    assert schedule is not None
    levels = generator.levels(DiffusionSampleConfig(steps="time", num_steps=4))
    expected = schedule(torch.tensor([1.0, 0.75, 0.5, 0.25]), torch.zeros(4))
    torch.testing.assert_close(levels.float(), expected.detach(), rtol=1e-4, atol=1e-3)
    assert generator.sample(None, [0], solver="heun", num_steps=3).isfinite().all()


def test_sampling_maps_by_one_level_for_all_is_refused(told: RunConfig) -> None:
    generator = make_task(told, "channel").generator
    with pytest.raises(ValueError, match=r"solver=heun knows one level for all"):
        generator.sample(None, [0], solver="heun", steps="time")
    with pytest.raises(ValueError, match=r"steps=cosine with .*use steps=time"):
        generator.sample(None, [0], solver="ddim")


@pytest.mark.parametrize("per", ["scalar", "told", "pixel"])
def test_an_interrupted_training_equals_an_uninterrupted_one(
    told: RunConfig, tmp_path: Path, device: Device, per: str
) -> None:
    shutil.copytree(told.folder, tmp_path / "twin")
    staged = CurriculumConfig(kind="easy_to_hard", num_clusters=2, pacing="fixed", stage_steps=3)
    settings: dict[str, Any] = {"data": DATA, "config": config(per, curriculum=staged), "family": "diffusion"}
    straight = train_generator(run=told, device=device, **settings)
    shutil.copytree(straight, tmp_path / "twin" / "diffusion")
    for path in (tmp_path / "twin" / "diffusion").glob("model.*"):
        path.unlink()
    newest = max((tmp_path / "twin" / "diffusion" / "checkpoints").iterdir(), key=lambda folder: folder.name)
    shutil.rmtree(newest)
    resumed = train_generator(run=dataclasses.replace(told, name="twin"), device=device, **settings)
    (_, first), (_, second) = load_model(straight), load_model(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_stages_of_a_curriculum_are_stretches_of_the_learned_time(told: RunConfig) -> None:
    curriculum = CurriculumConfig(kind="easy_to_hard", num_clusters=4, pacing="fixed", stage_steps=1)
    task, batch = make_task(told, "scalar", curriculum=curriculum), batch_of(told)
    task.modules["network"] = network = Silent()
    figures = task.step(batch, StepRandom(0, 0, 8))
    task.network.requires_grad_(False)
    highest = task.schedule(torch.tensor([0.75]), batch["labels"])
    lowest = task.schedule(torch.tensor([1.0]), batch["labels"])
    asked = network.calls[0][1]
    assert bool((asked <= highest).all()) and bool((asked >= lowest).all())
    sums = {key: value.tolist() for key, value in figures.items() if value.ndim}
    line = task.told(0, sums)
    assert line["curriculum/lowest_logsnr"] == pytest.approx(float(lowest), abs=1e-3)
    assert line["curriculum/highest_logsnr"] == pytest.approx(float(highest), abs=1e-3)
    assert line["curriculum/stage"] == 1
    with pytest.warns(UserWarning, match=r"stage 1 of 4 .* never saw times below 0\.75"):
        task._warn_if_unfinished(0)


def test_the_told_curves_are_quantiles_of_gamma_over_the_numbers_of_latents(told: RunConfig) -> None:
    schedule = make_task(told, "channel").schedule
    with torch.no_grad():
        schedule.scale += torch.tensor([-0.5, 0.0, 0.5, 1.0]).reshape(1, 4, 1, 1)
    rates = schedule.rates(torch.zeros(1))
    curves = gamma_curves(schedule, rates)
    gamma = schedule.gamma(torch.tensor([0.5]), rates).flatten()
    at = CURVE_TIMES.index(0.5)
    found = torch.stack([curves[name][at] for name in CURVES])
    assert bool((found.diff() > 0).all())
    assert bool((gamma.min() < found[0]) & (found[2] < gamma.max()))
    assert all(float(curve[0]) == 1 for curve in curves.values())
    alone = gamma_curves(schedule, rates[:, :1])
    torch.testing.assert_close(alone["gamma_low"], schedule.gamma(torch.tensor(CURVE_TIMES), rates[:, :1]).flatten())


def test_parts_of_a_batch_have_the_loss_of_the_whole(told: RunConfig) -> None:
    task, batch = make_task(told, "pixel"), batch_of(told)
    whole = task.step(batch, StepRandom(0, 1, 8))
    halves = [
        task.step({key: value[rows] for key, value in batch.items()}, StepRandom(0, 1, 8, part=part, parts=2))
        for part, rows in enumerate((slice(0, 4), slice(4, 8)))
    ]
    for key in ("loss", "error", "mean_logsnr", "learned_schedule/residual"):
        torch.testing.assert_close((halves[0][key] + halves[1][key]) / 2, whole[key])


def test_the_map_of_levels_and_the_image_reach_the_network(told: RunConfig) -> None:
    network = make_task(told, "pixel").network
    assert network.patches.in_channels == 12 and network.labels is None
    x, image, logsnr = torch.randn(3, 2, 4, 4, 4)
    seen = network.with_maps(x, logsnr, image)
    assert torch.equal(seen[:, :4], x) and torch.equal(seen[:, 4:8], image)
    alpha, sigma = variance_preserving(logsnr)
    torch.testing.assert_close(seen[:, 8:], 1 - torch.atan2(sigma, alpha) * (4 / math.pi))
    one = network.with_maps(x, torch.tensor([1.0, 2.0]), image)  # one level for each row, as features have it
    assert torch.equal(one, network.with_maps(x, torch.tensor([1.0, 2.0])[:, None, None, None].expand_as(x), image))


def train_here(root: str, name: str, per: str) -> None:
    """The training of one process of several."""
    run = RunConfig(name=name, root=root, device="cpu", precision="fp32", threads=1)
    train_generator(run=run, data=DATA, config=config(per), family="diffusion", device=setup(run))


def test_shards_of_weights_are_refused(told: RunConfig, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "parallel", "fsdp")
    with pytest.raises(ValueError, match=r"schedule\.kind=learned .* use run\.parallel=ddp"):
        train_generator(run=told, data=DATA, config=config("scalar"), family="diffusion", device=device)


@pytest.mark.slow
def test_two_processes_train_the_schedule_of_one(told: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(told.folder, tmp_path / "two")
    train_here(told.root, told.name, "pixel")
    program = f"{Path(__file__).stem}:train_here"
    sys.path.insert(0, str(Path(__file__).parent))
    forked.run_two(program, str(tmp_path), "two", "pixel", told=tmp_path / "told")
    (_, one), (_, two) = load_model(told.folder / "diffusion"), load_model(tmp_path / "two" / "diffusion")
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
