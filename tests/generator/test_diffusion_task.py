"""The training of a diffusion model: its loss, its draws, its learned uncertainty, and that it resumes to the bit."""

from __future__ import annotations

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
from torch import Tensor, nn

from engine.batches import StepRandom
from engine.checkpoint import load_checkpoint, load_model, save_checkpoint
from engine.config import DataConfig, RunConfig, TrainConfig
from engine.device import Device
from engine.optim import build_optimizer
from engine.shards import open_shards
from generator.config import (
    CurriculumConfig,
    DenoiserModelConfig,
    DiffusionConfig,
    DiffusionSampleConfig,
    MixedScheduleConfig,
    ScheduleConfig,
)
from generator.diffusion_task import LOGSNR_EDGES, DiffusionTask, Uncertainty
from generator.objective import Objective
from generator.path import noised
from generator.sample import load_generator
from generator.schedule import build_schedule
from generator.train import train_generator
from tokenizer.model import load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from training import Silent, records

TRAIN = TrainConfig(
    steps=4, batch_size=8, learning_rate=1e-2, decay="constant", ema=0.9, log_every=2, preview_every=4,
    checkpoint_every=2,
)  # fmt: skip
MODEL = DenoiserModelConfig(depth=1, width=32, heads=2)
CONFIG = DiffusionConfig(model=MODEL, train=TRAIN, sample=DiffusionSampleConfig(num_steps=2, batch_size=10))
DATA = DataConfig(workers=0)
PROGRESSIVE = CurriculumConfig(kind="progressive", start=3.0, end=-3.0)
SETTINGS: dict[str, dict[str, Any]] = {
    "v": {},
    "eps, Min-SNR, DDPM": {"target": "eps", "weight": "min_snr", "schedule": ScheduleConfig(kind="ddpm")},
    "flow": {"path": "flow", "target": "velocity", "schedule": ScheduleConfig(kind="logit_normal")},
    "EDM": {"path": "ve", "target": "F", "weight": "edm", "sigma_data": 0.5, "schedule": ScheduleConfig(kind="edm")},
    "P2, mixed": {
        "path": "gvp", "target": "velocity", "weight": "p2", "curriculum": PROGRESSIVE,
        "schedule": ScheduleConfig(kind="laplace", mixed=MixedScheduleConfig(share=0.2)),
    },
    "learned, zero terminal": {"weight": "learned", "schedule": ScheduleConfig(kind="iddpm", zero_terminal=True)},
}  # fmt: skip


def with_changes(**changes: Any) -> DiffusionConfig:
    return dataclasses.replace(CONFIG, **changes)


def make_task(run: RunConfig, **changes: Any) -> DiffusionTask:
    torch.manual_seed(0)
    train, test = (open_shards(run.folder / "codes" / split) for split in ("train", "test"))
    return DiffusionTask(
        config=with_changes(**changes), shards=train, test_shards=test, tokenizer=load_tokenizer(run.folder)
    )


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_loss_is_the_weighted_error_of_the_draws_of_the_schedule(run: RunConfig, settings: dict[str, Any]) -> None:
    """A silent network's error is the mean square of the target."""
    task, step = make_task(run, **settings), 3
    task.modules["network"] = network = Silent()
    batch = open_shards(run.folder / "codes" / "train").load(np.arange(8))
    figures = task.step(batch, StepRandom(0, step, 8))

    rng, latents = StepRandom(0, step, 8), batch["latents"].float()
    u, eps = rng.uniform(), rng.normal(*latents.shape[1:])
    shift = PROGRESSIVE.end if "curriculum" in settings else 0.0
    schedule = build_schedule(task.config.schedule)
    logsnr = schedule(u) + shift
    keys = ("path", "target", "weight", "sigma_data")
    objective = Objective(**{key: settings[key] for key in keys if key in settings})
    errors = objective.target_of(latents, eps, logsnr).square().mean((1, 2, 3))
    torch.testing.assert_close(figures["error"], errors.mean())
    torch.testing.assert_close(figures["mean_logsnr"], logsnr.mean())
    torch.testing.assert_close(figures["loss"], (objective.weight(logsnr) * errors).mean())
    weighted = objective.weight(logsnr) * errors
    inside = (20 * (1 - schedule.cdf(logsnr))).long() == torch.arange(20)[:, None]  # [N, B]
    torch.testing.assert_close(figures["draws_by_cluster"], inside.float().mean(1))
    torch.testing.assert_close(figures["loss_by_cluster"], (inside * weighted).mean(1))
    shares, _ = np.histogram(logsnr.numpy(), bins=LOGSNR_EDGES)
    torch.testing.assert_close(figures["draws_by_logsnr"], torch.from_numpy(shares / 8).float())
    seen, asked, _ = network.calls[0]
    torch.testing.assert_close(asked, logsnr)
    torch.testing.assert_close(seen, objective.network_input(noised(latents, eps, logsnr), logsnr))


def test_validation_asks_at_the_levels_of_the_last_step_and_tells_the_error_without_the_weight(run: RunConfig) -> None:
    levels = build_schedule(ScheduleConfig())((torch.arange(24) + 0.5) / 24) + PROGRESSIVE.end
    errors = set()
    for weight in ("plain", "min_snr", "learned"):
        task = make_task(run, target="eps", curriculum=PROGRESSIVE, weight=weight)
        task.modules["network"] = network = Silent()
        with torch.no_grad():
            figures = task.validate()
            assert task.validate() == figures
        asked = torch.cat([logsnr for _, logsnr, _ in network.calls[:3]])
        torch.testing.assert_close(asked.sort().values, levels)
        errors.add(figures["error"])
        assert (figures["loss"] == figures["error"]) == (weight != "min_snr")
    assert len(errors) == 1
    assert errors.pop() == pytest.approx(1, abs=0.1)  # the mean square of the noise


def test_a_preview_of_autoguided_sampling_does_without_the_guide(run: RunConfig) -> None:
    sample = dataclasses.replace(CONFIG.sample, guidance=2.0, guide="step-2")
    pictures = [make_task(run, sample=settings).preview()["samples"] for settings in (CONFIG.sample, sample)]
    assert torch.equal(*pictures)


def test_sampling_that_the_network_is_not_trained_for_is_refused_before_training(run: RunConfig) -> None:
    sample = dataclasses.replace(CONFIG.sample, from_zero_snr=True)
    with pytest.raises(ValueError, match=r"diffusion\.sample\.from_zero_snr"):
        make_task(run, path="ve", target="velocity", sample=sample)


# The learned uncertainty


def test_a_new_uncertainty_changes_nothing(run: RunConfig) -> None:
    batch = open_shards(run.folder / "codes" / "train").load(np.arange(8))
    figures, plain = (make_task(run, weight=weight).step(batch, StepRandom(0, 0, 8)) for weight in ("learned", "plain"))
    assert torch.equal(figures["loss"], figures["error"])
    assert torch.equal(figures["loss"], plain["loss"])


def test_uncertainty_becomes_the_logarithm_of_the_error() -> None:
    """The minimum of error / e^u + u; errors here vary by chance about a smooth function of the level."""
    uncertainty = Uncertainty()
    optimizer = build_optimizer(uncertainty, TrainConfig(learning_rate=1e-2, weight_decay=0.5))
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)

    def mean_error(logsnr: Tensor) -> Tensor:
        return 0.02 + 1.5 * torch.sigmoid(-logsnr / 2)

    generator, schedule = torch.Generator().manual_seed(0), build_schedule(ScheduleConfig())
    for _ in range(400):
        logsnr, chance = schedule(torch.rand(256, generator=generator)), torch.rand(256, generator=generator)
        u = uncertainty(logsnr)
        (mean_error(logsnr) * 2 * chance / u.exp() + u).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    logsnr = torch.linspace(-6, 6, 49)
    with torch.no_grad():
        torch.testing.assert_close(uncertainty(logsnr), mean_error(logsnr).log(), rtol=0, atol=0.2)


def test_uncertainty_keeps_single_precision_under_autocast() -> None:
    uncertainty, logsnr = Uncertainty(), torch.linspace(-18, 18, 7)
    nn.init.normal_(uncertainty.weight, generator=torch.Generator().manual_seed(0))
    expected = uncertainty(logsnr)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(uncertainty(logsnr), expected, rtol=0, atol=0)


def test_uncertainty_is_trained_and_told_but_no_part_of_the_model(run: RunConfig, device: Device) -> None:
    config = with_changes(weight="learned", train=dataclasses.replace(TRAIN, steps=40, log_every=10))
    folder = train_generator(run=run, data=DATA, config=config, family="diffusion", device=device)
    lines = records(folder)
    logged = [line for line in lines if "loss" in line]
    assert logged[0]["grad_norm/uncertainty"] > 0 and "learning_rate/uncertainty" in logged[0]
    assert logged[-1]["loss"] < logged[-1]["error"] < logged[0]["error"]
    assert lines[-1]["validation/loss"] < lines[-1]["validation/error"]
    _, weights = load_model(folder)
    assert not any("uncertainty" in name for name in weights)
    assert load_generator(folder, "diffusion").sample(None, [0], num_steps=2).isfinite().all()


# Resuming


@pytest.mark.parametrize(
    "changes", [{"weight": "learned", "curriculum": PROGRESSIVE}, SETTINGS["P2, mixed"]], ids=["learned", "mixed"]
)
def test_an_interrupted_training_equals_an_uninterrupted_one(
    run: RunConfig, tmp_path: Path, device: Device, changes: dict[str, Any]
) -> None:
    shutil.copytree(run.folder, tmp_path / "twin")
    settings: dict[str, Any] = {"data": DATA, "config": with_changes(**changes), "family": "diffusion"}
    straight = train_generator(run=run, device=device, **settings)
    shutil.copytree(straight, tmp_path / "twin" / "diffusion")
    for path in (tmp_path / "twin" / "diffusion").glob("model.*"):
        path.unlink()
    newest = max((tmp_path / "twin" / "diffusion" / "checkpoints").iterdir(), key=lambda folder: folder.name)
    shutil.rmtree(newest)
    resumed = train_generator(run=dataclasses.replace(run, name="twin"), device=device, **settings)
    (_, first), (_, second) = load_model(straight), load_model(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    times = {"samples_per_second"}
    told = [[{k: v for k, v in line.items() if k not in times} for line in records(f)] for f in (straight, resumed)]
    assert told[0] == told[1]


def test_a_run_of_before_the_newer_keys_is_finished_and_resumes(
    run: RunConfig, device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its identity and card lack curriculum, weight_gamma, sigma_data and parts of schedule, its checkpoint vectors."""
    folder = train_generator(run=run, data=DATA, config=CONFIG, family="diffusion", device=device)
    before = load_generator(folder, "diffusion").sample(torch.tensor([0, 1]), [0, 1], num_steps=2)

    def strip(section: dict[str, Any]) -> None:
        for key in ("curriculum", "weight_gamma", "sigma_data"):
            del section[key]
        for key in ("mixed", "zero_terminal"):
            del section["schedule"][key]

    card = json.loads((folder / "model.json").read_text())
    strip(card["config"])
    strip(card["identity"]["diffusion"])
    (folder / "model.json").write_text(json.dumps(card))
    identity = json.loads((folder / "identity.json").read_text())
    strip(identity["diffusion"])
    (folder / "identity.json").write_text(json.dumps(identity))
    saved = load_checkpoint(folder / "checkpoints")
    assert saved is not None
    weights, averaged, state = saved
    state["task"] = {}
    del state["progress"]["vector_sums"]
    save_checkpoint(folder / "checkpoints", state.pop("step"), weights=weights, averaged=averaged, state=state)

    written = (folder / "model.safetensors").stat().st_mtime_ns
    settings: dict[str, Any] = {"run": run, "data": DATA, "family": "diffusion", "device": device}
    train_generator(config=CONFIG, **settings)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    after = load_generator(folder, "diffusion").sample(torch.tensor([0, 1]), [0, 1], num_steps=2)
    assert torch.equal(before, after)
    longer = dataclasses.replace(TRAIN, steps=5)
    train_generator(config=with_changes(train=longer), **settings)
    assert "resuming at step 4 of 5" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"diffusion\.curriculum\.kind: 'uniform' -> 'progressive'"):
        train_generator(config=with_changes(train=longer, curriculum=PROGRESSIVE), **settings)


def test_zero_terminal_is_trained_at_the_end_of_the_range(run: RunConfig) -> None:
    """The level without signal counts as the noisiest that networks are trained on, and stays finite there."""
    task = make_task(run, **SETTINGS["learned, zero terminal"])
    batch = open_shards(run.folder / "codes" / "train").load(np.arange(8))
    latents, eps = batch["latents"].float(), torch.ones_like(batch["latents"].float())
    logsnr = task.curriculum.draw(torch.zeros(8), 0)
    assert float(logsnr[0]) == pytest.approx(2 * math.log(1e-4 / (1 - 1e-4)))
    assert task.losses(task.errors(latents, batch["labels"], logsnr, eps), logsnr).isfinite().all()


def test_patches_with_more_numbers_than_the_network_has_channels_are_warned_of(run: RunConfig) -> None:
    narrow = dataclasses.replace(MODEL, width=8, patch_size=2)
    with pytest.warns(UserWarning, match=r"2 x 2 x 4 latents has 16 numbers, .* 8 channels .*target=eps .* target=x0"):
        make_task(run, model=narrow, target="eps")
    make_task(run, model=narrow, target="x0")  # an image has fewer directions than numbers
