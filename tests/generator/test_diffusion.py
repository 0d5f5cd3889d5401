"""Diffusion generator and task: seeds decide, labels drop, previews repeat, training learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.batches import StepRandom
from engine.config import TrainConfig, to_dict
from engine.shards import Shards, ShardWriter, open_shards
from generator.config import (
    CurriculumConfig,
    DenoiserModelConfig,
    DiffusionConfig,
    DiffusionSampleConfig,
    MixedScheduleConfig,
    ScheduleConfig,
)
from generator.denoiser import DiT
from generator.diffusion import Diffusion
from generator.diffusion_task import DiffusionTask
from generator.objective import TARGETS, Objective
from generator.path import PATHS, beside, variance_preserving
from generator.schedule import build_schedule
from generator.solvers import SampleNoise
from generator.steps import solver_levels
from tokenizer.model import Tokenizer

SHAPE = (2, 4, 4)
MODEL = DenoiserModelConfig(depth=2, width=32, heads=4, patch_size=2, label_dropout=0.25)
CONFIG = DiffusionConfig(
    model=MODEL,
    train=TrainConfig(learning_rate=1e-2, decay="constant"),
    sample=DiffusionSampleConfig(num_steps=4, batch_size=5),
)
SAMPLING = {"num_steps": 4}


class Grey(nn.Module):
    """Stands for a tokenizer: the first latent channel as grey level."""

    latent_shape, code_fingerprint = SHAPE, "grey"
    grid, length, vocab_size = SHAPE[1:], 16, 4

    def from_latents(self, latents: Tensor) -> Tensor:
        return (latents[:, :1] * 64 + 128).clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Class 0 lies around -1, class 1 around +1; every tenth label is unknown."""
    return write_shards(tmp_path_factory.mktemp("codes") / "train", ["low", "high"])


def write_shards(folder: Path, class_names: list[str]) -> Shards:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(203) % 2
    latents = (2.0 * labels - 1)[:, None, None, None, None] + 0.1 * torch.randn(203, 1, *SHAPE, generator=generator)
    writer = ShardWriter(folder, views=("original",))
    writer.append(labels=labels.masked_fill(torch.arange(203) % 10 == 9, -1), latents=latents)
    meta = {"tokenizer_fingerprint": "grey", "grid": [4, 4], "vocab_size": 2, "latent_shape": list(SHAPE)}
    writer.close({**meta, "class_names": class_names, "images": {}})
    return open_shards(folder)


def make_task(shards: Shards, config: DiffusionConfig = CONFIG) -> DiffusionTask:
    torch.manual_seed(0)
    return DiffusionTask(config=config, shards=shards, test_shards=shards, tokenizer=cast(Tokenizer, Grey()))


def train(task: DiffusionTask, shards: Shards, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        rows = np.random.default_rng(step).integers(len(shards), size=64)
        loss = task.step(shards.load(rows), StepRandom(0, step, 64))["loss"]
        task.optimizers["network"].zero_grad()
        loss.backward()
        task.optimizers["network"].step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def trained(shards: Shards) -> DiffusionTask:
    task = make_task(shards)
    train(task, shards, steps=150)
    return task


@torch.inference_mode()
def figures_of(task: DiffusionTask) -> dict[str, float]:
    return task.validate()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eta": 1.0},
        {"solver": "heun", "guidance": 2.0},
        {"solver": "ddpm", "steps": "time", "from_zero_snr": True},
        {"solver": "euler", "steps": "flow", "guidance": 3.0, "guidance_rescale": 0.7},
        {"solver": "dpmpp_2m", "steps": "logsnr", "guidance": 2.0, "guidance_first": -1.0, "guidance_last": 3.0},
        {"solver": "sde_dpmpp_2m", "steps": "karras", "rho": 3.0},
        {"solver": "euler_maruyama", "steps": "list", "levels": [-9, -2, 0, 3], "snapshot": 3, "ema_width": 0.1},
    ],
)
def test_a_sample_depends_on_its_seed_and_label_alone(trained: DiffusionTask, settings: dict[str, Any]) -> None:
    labels = torch.tensor([0, 1, -1, 1])
    together = trained.generator.sample(labels, [5, 6, 7, 8], **SAMPLING, **settings)
    alone = trained.generator.sample(labels[3:], [8], **SAMPLING, **settings)
    assert together.shape == (4, *SHAPE)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together[3:], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[1], together[3], atol=1e-3)


def test_training_learns_the_classes(trained: DiffusionTask, shards: Shards) -> None:
    made = trained.generator.sample(torch.tensor([0, 1]).repeat(16), range(32), num_steps=20)
    means = made.mean((1, 2, 3)).reshape(16, 2)
    assert torch.equal(means > 0, torch.tensor([False, True]).expand(16, 2))
    torch.testing.assert_close(means.mean(0), torch.tensor([-1.0, 1.0]), rtol=0, atol=0.2)
    assert figures_of(trained)["loss"] < 0.3 * figures_of(make_task(shards))["loss"]


@pytest.mark.parametrize("kind", ["uniform_time", "logit_normal"])
def test_flow_matching_learns_too(shards: Shards, kind: Any) -> None:
    config = DiffusionConfig(
        model=MODEL, train=CONFIG.train, path="flow", target="velocity", schedule=ScheduleConfig(kind=kind)
    )
    losses = train(make_task(shards, config), shards, steps=60)
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:3])


def test_guidance_one_is_no_guidance_and_more_pushes_further(trained: DiffusionTask) -> None:
    labels, seeds = torch.tensor([1, 1]), [0, 1]
    plain = trained.generator.sample(labels, seeds, **SAMPLING)
    torch.testing.assert_close(plain, trained.generator.sample(labels, seeds, **SAMPLING, guidance=1.0), rtol=0, atol=0)
    null = trained.generator.sample(None, seeds, **SAMPLING)
    torch.testing.assert_close(
        trained.generator.sample(labels, seeds, **SAMPLING, guidance=0.0), null, rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(plain, trained.generator.sample(labels, seeds, **SAMPLING, guidance=3.0), atol=1e-2)


@pytest.mark.parametrize("bounds", [{"guidance_first": 20.0}, {"guidance_last": -20.0}])
def test_guidance_outside_all_steps_is_no_guidance(trained: DiffusionTask, bounds: dict[str, Any]) -> None:
    labels, seeds = torch.tensor([1, 0]), [0, 1]
    plain = trained.generator.sample(labels, seeds, **SAMPLING)
    torch.testing.assert_close(
        plain, trained.generator.sample(labels, seeds, **SAMPLING, guidance=3.0, **bounds), rtol=0, atol=0
    )


class Ideal(nn.Module):
    """The best network for latents N(0, 1/4), in the terms of any objective."""

    latent_shape, blocks = SHAPE, ()

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective, self.positions = objective, torch.zeros(0)

    def read(self, condition: Tensor) -> Tensor:
        return condition

    def forward(self, seen: Tensor, logsnr: Tensor, labels: Tensor) -> Tensor:
        z = seen / self.objective.network_input(torch.ones_like(seen), logsnr)
        alpha, sigma = (beside(value, z) for value in variance_preserving(logsnr))
        x0 = alpha * z / (alpha**2 + 4 * sigma**2)
        return self.objective.target_of(x0, (z - alpha * x0) / sigma, logsnr)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", TARGETS)
def test_samples_of_ideal_networks_do_not_depend_on_path_and_target(path: str, target: str) -> None:
    """The solvers' own test has the closed form; here its end is x0 = eps / 2 up to the steps' error."""
    told = {"path": path, "target": target, "sigma_data": 0.7, "model": to_dict(MODEL)}
    card = {"config": told, "num_classes": 0, "class_names": [], "tokenizer_fingerprint": "grey"}
    generator = Diffusion(cast(DiT, Ideal(Objective.from_config(told))), card)
    start = SampleNoise([1, 2], SHAPE)()
    made = generator.sample(None, [1, 2], solver="heun", steps="flow", num_steps=40)
    torch.testing.assert_close(made, start / 2, rtol=0, atol=2e-3 * float(start.abs().max()))
    if target not in ("eps", "velocity"):
        made = generator.sample(None, [1, 2], solver="heun", steps="flow", num_steps=40, from_zero_snr=True)
        torch.testing.assert_close(made, start / 2, rtol=0, atol=2e-3 * float(start.abs().max()))


@pytest.mark.parametrize(("path", "target"), [("vp", "eps"), ("ve", "eps"), ("ve", "velocity")])
def test_a_start_without_signal_needs_a_target_that_says_something_there(
    shards: Shards, path: Any, target: Any
) -> None:
    task = make_task(shards, DiffusionConfig(model=MODEL, path=path, target=target))
    with pytest.raises(ValueError, match=r"diffusion\.sample\.from_zero_snr .* train with diffusion\.target=v"):
        task.generator.sample(None, [0], from_zero_snr=True)
    task.generator.sample(None, [0], num_steps=1)


def guide_of(trained: DiffusionTask, **changed: Any) -> Diffusion:
    """A weaker network: the same with noise in its weights; keys of its card may be changed."""
    weights = {key: value + 0.02 * torch.randn_like(value) for key, value in trained.network.state_dict().items()}
    return Diffusion.from_card({**trained.generator.card, **changed}, weights)


@pytest.fixture
def guidable(trained: DiffusionTask) -> Diffusion:
    """The trained generator once more, to which a guide may be attached."""
    return Diffusion.from_card(trained.generator.card, trained.network.state_dict())


def test_a_guide_pushes_away_from_itself(trained: DiffusionTask, guidable: Diffusion) -> None:
    torch.manual_seed(0)
    labels, seeds, guided = torch.tensor([1, 0]), [0, 1], {**SAMPLING, "guidance": 2.0, "guide": "weaker"}
    plain = guidable.sample(labels, seeds, **SAMPLING)
    guidable.guide = Diffusion.from_card(guidable.card, guidable.network.state_dict())
    torch.testing.assert_close(guidable.sample(labels, seeds, **guided), plain, rtol=1e-4, atol=1e-4)
    guidable.guide = guide_of(trained)
    pushed = guidable.sample(labels, seeds, **guided)
    assert not torch.allclose(pushed, plain, atol=1e-2)
    nothing = guidable.sample(labels, seeds, **{**guided, "guidance": 0.0})
    torch.testing.assert_close(nothing, guidable.guide.sample(labels, seeds, **SAMPLING), rtol=1e-4, atol=1e-4)
    without = trained.generator.sample(labels, seeds, **SAMPLING, guidance=2.0)
    torch.testing.assert_close(guidable.sample(labels, seeds, **SAMPLING, guidance=2.0), without, rtol=1e-4, atol=1e-4)


def test_autoguidance_needs_no_null_label(shards: Shards) -> None:
    model = DenoiserModelConfig(depth=1, width=32, label_dropout=0.0)
    sample = DiffusionSampleConfig(guidance=2.0, guide="weaker", num_steps=2)
    task = make_task(shards, DiffusionConfig(model=model, sample=sample))
    task.generator.guide = make_task(shards, DiffusionConfig(model=model)).generator
    task.generator.sample(torch.tensor([0]), [0], num_steps=2, guidance=2.0, guide="weaker")


def test_a_missing_or_foreign_guide_is_refused(trained: DiffusionTask, guidable: Diffusion) -> None:
    guided = {**SAMPLING, "guidance": 2.0, "guide": "weaker"}
    with pytest.raises(ValueError, match=r"diffusion\.sample\.guide='weaker' is not attached"):
        guidable.sample(None, [0], **guided)
    for changed in ({"tokenizer_fingerprint": "other"}, {"class_names": ["low", "high", "no"], "num_classes": 2}):
        guidable.guide = guide_of(trained, **changed)
        key = next(iter(changed))
        with pytest.raises(ValueError, match=rf"guide='weaker' has {key}=.*choose a guide of the same tokenizer"):
            guidable.sample(None, [0], **guided)


def test_a_guide_without_a_word_at_the_start_is_refused(guidable: Diffusion, shards: Shards) -> None:
    guidable.guide = make_task(shards, DiffusionConfig(model=MODEL, target="eps")).generator
    guided = {**SAMPLING, "guidance": 2.0, "guide": "weaker"}
    with pytest.raises(ValueError, match=r"guide='weaker' has a target that .*\.from_zero_snr starts: choose another"):
        guidable.sample(None, [0], **guided, from_zero_snr=True)
    for settings in ({}, {"from_zero_snr": True, "guidance_first": -9.0}):
        assert guidable.sample(None, [0], **guided, **settings).isfinite().all()


def test_steps_in_time_are_those_of_the_training_schedule(shards: Shards) -> None:
    mixed = ScheduleConfig(kind="laplace", mixed=MixedScheduleConfig(kind="cosine", share=0.2))
    for config in (mixed, ScheduleConfig(kind="edm", location=1.0), ScheduleConfig()):
        generator = make_task(shards, DiffusionConfig(model=MODEL, schedule=config)).generator
        levels = generator.levels(DiffusionSampleConfig(steps="time", num_steps=10))
        expected = solver_levels("time", 10, first=-10.0, last=10.0, schedule=build_schedule(config))
        torch.testing.assert_close(levels, expected)


def test_steps_in_time_follow_the_curriculum_to_its_end(shards: Shards) -> None:
    curriculum = CurriculumConfig(kind="progressive", start=3.0, end=-1.0)
    generator = make_task(shards, DiffusionConfig(model=MODEL, curriculum=curriculum)).generator
    levels = generator.levels(DiffusionSampleConfig(steps="time", num_steps=10))
    moved = build_schedule(ScheduleConfig(location=-1.0))
    torch.testing.assert_close(levels, solver_levels("time", 10, first=-10.0, last=10.0, schedule=moved))


def test_steps_that_find_no_room_are_refused_before_training(shards: Shards) -> None:
    schedule, sample = ScheduleConfig(kind="edm", location=-15.0, scale=0.5), DiffusionSampleConfig(steps="time")
    with pytest.raises(ValueError, match=r"diffusion\.sample\.steps=time .* must rise"):
        make_task(shards, DiffusionConfig(model=MODEL, schedule=schedule, sample=sample))


def test_labels_are_dropped_at_their_rate(shards: Shards) -> None:
    task, seen = make_task(shards), []
    network = task.modules["network"]
    network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[2]))
    batch = {"latents": torch.zeros(8000, *SHAPE), "labels": torch.arange(8000) % 2}
    with torch.no_grad():
        task.step(batch, StepRandom(0, 0, 8000))
    dropped = seen[0] == 2
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.02)
    assert torch.equal(seen[0][~dropped], batch["labels"][~dropped])


def test_unknown_labels_and_unlabelled_training_meet_the_null_label(shards: Shards) -> None:
    seen: list[Tensor] = []
    for label_dropout, null in ((0.0, 2), (1.0, 0)):
        model = DenoiserModelConfig(depth=1, width=32, label_dropout=label_dropout)
        task = make_task(shards, DiffusionConfig(model=model))
        task.modules["network"].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[2]))
        task.step({"latents": torch.zeros(2, *SHAPE), "labels": torch.tensor([-1, -1])}, StepRandom(0, 0, 2))
        assert seen[-1].tolist() == [null, null]
    assert task.generator.num_classes == 0
    figures_of(task)
    assert set(seen[-1].tolist()) == {0}


def test_the_loss_does_not_depend_on_how_a_batch_is_cut(trained: DiffusionTask, shards: Shards) -> None:
    batch = shards.load(np.arange(16))
    whole = trained.step(batch, StepRandom(1, 9, 16))
    cut = [{key: value[rows] for key, value in batch.items()} for rows in (slice(8), slice(8, 16))]
    halves = [trained.step(half, StepRandom(1, 9, 16, part=part, parts=2)) for part, half in enumerate(cut)]
    for key, value in whole.items():
        torch.testing.assert_close((halves[0][key] + halves[1][key]) / 2, value)
    torch.testing.assert_close(whole["loss_by_cluster"].sum(), whole["loss"])


def test_clusters_run_from_little_noise_to_much(shards: Shards) -> None:
    """A new network predicts 0, so its eps loss is 1 everywhere, and its v loss is alpha^2 + sigma^2 E[x^2]."""
    quarters = CurriculumConfig(num_clusters=4)
    task = make_task(shards, DiffusionConfig(model=MODEL, curriculum=quarters))
    figures = figures_of(task)
    assert figures == figures_of(task)
    mean_square = float(shards.load(np.arange(203))["latents"].square().mean())
    times = torch.linspace(0, 1, 4001)
    for quarter in (1, 2, 3, 4):
        time = times[(quarter - 1) * 1000 : quarter * 1000]
        alpha2 = torch.cos(time * torch.pi / 2).square()
        expected = float((alpha2 + (1 - alpha2) * mean_square).mean())
        assert figures[f"loss_cluster/{quarter:02d}"] == pytest.approx(expected, rel=0.1)
    eps = DiffusionConfig(model=MODEL, target="eps")
    assert figures_of(make_task(shards, eps))["loss"] == pytest.approx(1, abs=0.05)


def test_preview_is_decoded_and_repeatable(trained: DiffusionTask) -> None:
    pictures = trained.preview()["samples"]
    assert pictures.dtype == torch.uint8
    assert pictures.shape == (16, 3, 4, 4)
    assert float(pictures[:8].float().mean()) < float(pictures[8:].float().mean()), "sorted by class"
    assert torch.equal(pictures, trained.preview()["samples"])


def test_features_are_one_row_per_latent(trained: DiffusionTask, shards: Shards) -> None:
    latents = shards.load(np.arange(6))["latents"]
    assert trained.generator.taps == ("block1", "block2")
    features = feature(trained, latents, "block2")
    assert features.shape == (6, 32) and features.dtype == torch.float32
    torch.testing.assert_close(features[4:], feature(trained, latents[4:], "block2"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features, feature(trained, latents, "block2@logsnr=2.0"))
    for other in ("block1", "block2@logsnr=-1"):
        assert not torch.allclose(features, feature(trained, latents, other), atol=1e-3)
    for wrong in ("block0", "block3", "block_1", "block1@1", "block1@logsnr=much", "block1@logsnr=nan"):
        with pytest.raises(ValueError, match=f"tap='{wrong}' is unknown"):
            trained.generator.features(latents, ["block1", wrong])


def test_features_at_several_taps_take_one_pass_for_each_noise_level(trained: DiffusionTask, shards: Shards) -> None:
    latents, passes = shards.load(np.arange(6))["latents"], []
    hooks = [
        block.register_forward_hook(lambda *args, number=number: passes.append(number))
        for number, block in enumerate(trained.network.blocks, start=1)
    ]
    taps = ["block2", "block1", "block1@logsnr=-3", "block1@logsnr=2"]
    found = trained.generator.features(latents, taps)
    assert list(found) == taps and sorted(passes) == [1, 1, 2]  # no deeper than the deepest tap of each level
    assert torch.equal(found["block1"], found["block1@logsnr=2"])
    for hook in hooks:
        hook.remove()
    for tap in taps:
        assert torch.equal(found[tap], feature(trained, latents, tap)) and not found[tap].requires_grad
    assert trained.generator.features(latents, []) == {}


def test_features_stand_behind_the_null_label(trained: DiffusionTask, shards: Shards) -> None:
    latents, table = shards.load(np.arange(6))["latents"], trained.network.labels.weight
    before, kept = feature(trained, latents, "block2"), table.detach().clone()
    try:
        with torch.no_grad():
            table[:-1] += 1
            assert torch.equal(feature(trained, latents, "block2"), before)
            table[-1] += 1
            assert not torch.allclose(feature(trained, latents, "block2"), before)
    finally:
        with torch.no_grad():
            table.copy_(kept)


def feature(trained: DiffusionTask, latents: torch.Tensor, tap: str) -> torch.Tensor:
    return trained.generator.features(latents, [tap])[tap]


def test_a_saved_generator_samples_the_same(trained: DiffusionTask) -> None:
    card = {"config": to_dict(CONFIG), "num_classes": 2, "class_names": ["low", "high"], "latent_shape": list(SHAPE)}
    card = json.loads(json.dumps({**card, "tokenizer_fingerprint": "grey", "fingerprint": "f"}))
    loaded = Diffusion.from_card(card, trained.network.state_dict())
    assert (loaded.family, loaded.num_classes, loaded.class_names) == ("diffusion", 2, ("low", "high"))
    assert (loaded.tokenizer_fingerprint, loaded.fingerprint) == ("grey", "f")
    labels = torch.tensor([0, 1])
    torch.testing.assert_close(
        loaded.sample(labels, [1, 2], **SAMPLING), trained.generator.sample(labels, [1, 2], **SAMPLING)
    )


def test_cards_from_before_a_setting_have_its_default(trained: DiffusionTask) -> None:
    """Only keys that every generator has had: what is younger must be what it was then."""
    shape = ("preset", "patch_size", "depth", "width", "heads", "mlp_ratio", "label_dropout")
    told = trained.generator.card["config"]
    config = {key: told[key] for key in ("path", "target", "weight")}
    config["schedule"] = {key: told["schedule"][key] for key in ("kind", "location", "scale")}
    config["model"] = {key: told["model"][key] for key in shape}
    old = Diffusion.from_card({**trained.generator.card, "config": config}, trained.network.state_dict())
    for settings in ({}, {"steps": "time", "solver": "heun"}):
        torch.testing.assert_close(
            old.sample(None, [3], **SAMPLING, **settings),
            trained.generator.sample(None, [3], **SAMPLING, **settings),
        )


def test_wrong_labels_shapes_and_settings_are_refused(trained: DiffusionTask) -> None:
    generator = trained.generator
    with pytest.raises(ValueError, match="label 2 must be"):
        generator.sample(torch.tensor([0, 2]), [0, 1])
    with pytest.raises(ValueError, match="1 labels for 2 samples"):
        generator.sample(torch.tensor([0]), [0, 1])
    with pytest.raises(ValueError, match=r"latents of shape \[1, 3, 4, 4\] do not fit"):
        generator.features(torch.zeros(1, 3, 4, 4), ["block1"])
    with pytest.raises(ValueError, match=r"eta=0\.5 needs solver=ddim"):
        generator.sample(None, [0], solver="heun", eta=0.5)
    with pytest.raises(ValueError, match=r"first_logsnr=9 must lie below last_logsnr=1"):
        generator.sample(None, [0], first_logsnr=9, last_logsnr=1)


def test_guidance_needs_a_trained_null_label(shards: Shards) -> None:
    for label_dropout in (0.0, 1.0):
        model = DenoiserModelConfig(depth=1, width=32, label_dropout=label_dropout)
        with pytest.raises(ValueError, match=r"diffusion\.sample\.guidance=2.* use guidance=1"):
            make_task(shards, DiffusionConfig(model=model, sample=DiffusionSampleConfig(guidance=2.0)))


def test_labels_beyond_the_class_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label 1 must be"):
        make_task(write_shards(tmp_path / "train", ["low"]))
