"""Speeds are measured on the real steps of a tiny experiment; no test here asks how fast they are."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine import flops
from engine.config import DataConfig, RunConfig, TrainConfig
from engine.device import Device, setup
from engine.flops import forward_flops
from engine.shards import open_shards
from engine.sources import open_images
from engine.task import Task
from eval.bench import Bench, smaller_batch
from eval.speed import (
    RandomImages,
    code_flops,
    measure_autoregressive_step,
    measure_decoding,
    measure_diffusion_step,
    measure_tokenizer,
    rows_per_image,
    speed,
    step_flops,
    usable_shards,
)
from eval.stopwatch import LEAST, WARM_UP, time_calls, time_steps
from generator.autoregressive import VIM
from generator.card import generator_card
from generator.condition_config import ConditionConfig, TextConfig
from generator.config import (
    AutoregressiveConfig,
    AutoregressiveModelConfig,
    AutoregressiveSampleConfig,
    DenoiserModelConfig,
    DiffusionConfig,
    DiffusionSampleConfig,
    ScheduleConfig,
)
from generator.consistency_config import ObjectiveConfig
from generator.learned_config import LearnedScheduleConfig
from generator.text import ByteEncoder
from tokenizer.adversary import passes_per_step
from tokenizer.config import (
    DiscriminatorConfig,
    TokenizerConfig,
    TokenizerLossConfig,
    TokenizerModelConfig,
    TowerConfig,
)
from tokenizer.discriminator import build_discriminator
from tokenizer.encode import encode_flops
from tokenizer.model import Tokenizer
from tokenizer.perceptual import open_perceptual
from tokenizer.train import TokenizerTask

TOWER = TowerConfig(blocks=1, width=16, heads=2, mlp=32)
TRAIN = TrainConfig(batch_size=4)
TOKENIZER = TokenizerConfig(
    model=TokenizerModelConfig(encoder=TOWER, decoder=TOWER, patch_size=4, vocab_size=16, code_dim=4), train=TRAIN
)
AUTOREGRESSIVE = AutoregressiveConfig(
    model=AutoregressiveModelConfig(depth=1, width=16, heads=2),
    train=TRAIN,
    sample=AutoregressiveSampleConfig(batch_size=2, guidance=2.0),
)
DIFFUSION = DiffusionConfig(
    model=DenoiserModelConfig(depth=1, width=16, heads=2),
    train=TRAIN,
    sample=DiffusionSampleConfig(batch_size=2, num_steps=2, solver="heun", guidance=2.0),
)
STEPS = ("tokenizer step", "autoregressive step", "diffusion step")
SAMPLING = ("autoregressive sampling", "diffusion sampling")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr(flops, "RATE_SECONDS", 0.01)
    monkeypatch.setitem(flops.RATE_SIDE, "cpu", 256)
    return RunConfig(name="tiny", root=str(tmp_path), device="cpu", precision="fp32", threads=1)


@pytest.fixture
def device(run: RunConfig) -> Device:
    return setup(run)


def test_every_stage_has_a_row(run: RunConfig, device: Device, capsys: pytest.CaptureFixture[str]) -> None:
    rows = speed(
        run=run, data=DataConfig(size=16), tokenizer=TOKENIZER, autoregressive=AUTOREGRESSIVE, diffusion=DIFFUSION,
        device=device, seconds=0.1,
    )  # fmt: skip
    named = {row["name"]: row for row in rows}
    assert set(named) == {"image loading", "code loading", *STEPS, *SAMPLING}
    for row in rows:
        assert row["seconds"] > 0 and row["images_per_second"] > 0 and row["peak_memory_bytes"] > 0
    for name in (*STEPS, *SAMPLING):
        row = named[name]
        assert row["dtype"] == "float32" and row["batch_size"] >= 1
        assert (
            row["ratio"] == pytest.approx(row["flops_per_second"] / row["matmul_flops_per_second"]) and row["ratio"] > 0
        )
    for name in (*STEPS, "autoregressive sampling"):
        assert named[name]["tokens_per_second"] == pytest.approx(16 * named[name]["images_per_second"])
    written = json.loads((run.folder / "eval" / "speed.json").read_text())
    assert written["rows"] == rows
    assert {"cpu", "cores", "threads", "torch", "precision"} <= written["machine"].keys()
    assert "tokenizer step" in capsys.readouterr().out


def test_absent_families_have_no_row(run: RunConfig, device: Device) -> None:
    rows = speed(
        run=run, data=DataConfig(size=16), tokenizer=TOKENIZER, autoregressive=None, diffusion=None, device=device,
        seconds=0.02,
    )  # fmt: skip
    assert [row["name"] for row in rows] == ["image loading", "code loading", "tokenizer step"]


def test_sampling_counts_what_the_solver_computes(run: RunConfig, device: Device) -> None:
    rows = speed(
        run=run, data=DataConfig(size=16), tokenizer=TOKENIZER, autoregressive=None, diffusion=DIFFUSION, device=device,
        seconds=0.1,
    )  # fmt: skip
    step, sampling = ({row["name"]: row for row in rows}[name] for name in ("diffusion step", "diffusion sampling"))
    # Heun calls the network twice a step but once in the last one; guidance doubles each call.
    assert sampling["note"].endswith("2 steps of 2 with heun")
    assert sampling["flops_per_image"] / (step["flops_per_image"] / 3) == pytest.approx(3 * 2)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_other_conditions_than_classes_are_measured(run: RunConfig, device: Device, kind: Any) -> None:
    condition = ConditionConfig(kind=kind, text=TextConfig(captions="data") if kind == "text" else TextConfig())
    fly = replace(AUTOREGRESSIVE, condition=condition, codes="on_the_fly") if kind == "text" else None
    rows = speed(
        run=run, data=DataConfig(size=16), tokenizer=TOKENIZER, autoregressive=fly,
        diffusion=replace(DIFFUSION, condition=condition), device=device, seconds=0.05,
    )  # fmt: skip
    told = {row["name"]: row for row in rows}
    assert told.keys() >= {*STEPS[2 if fly is None else 1 :], *SAMPLING[1 if fly is None else 0 :]}
    steps = told["diffusion sampling"]["flops_per_image"] / (told["diffusion step"]["flops_per_image"] / 3)
    assert steps == pytest.approx(3 * 2)


def test_rates_of_pixels_are_computed_once_a_sample_and_once_a_training_step(run: RunConfig, device: Device) -> None:
    usual = replace(
        DIFFUSION, condition=ConditionConfig(kind="image"),
        sample=DiffusionSampleConfig(batch_size=2, num_steps=2, solver="ddpm", steps="time"),
    )  # fmt: skip
    found = {}
    for channels in (8, 16):
        learned = LearnedScheduleConfig(per="pixel", channels=channels)
        rows = speed(
            run=run, data=DataConfig(size=16), tokenizer=replace(TOKENIZER, low_resolution=2), autoregressive=None,
            diffusion=replace(usual, schedule=ScheduleConfig(kind="learned", learned=learned)), device=device,
            seconds=0.02,
        )  # fmt: skip
        found[channels] = {row["name"]: row.get("flops_per_image") for row in rows}
    # Latents are 4 x 4 x 4: 3 x 3 convolutions of 4, K, K, K and 4 channels.
    small, large = (2 * 9 * 16 * (2 * 4 * each + 2 * each**2) for each in (8, 16))
    for name, factor in (("diffusion step", 3), ("diffusion sampling", 1)):
        assert found[16][name] - found[8][name] == pytest.approx(factor * (large - small), abs=1)


def test_one_more_code_attends_to_a_text_too() -> None:
    size: dict[str, Any] = {"vocab_size": 32, "length": 24, "num_classes": 3}
    text = ByteEncoder(width=16, length=9, depth=1)
    told, labelled = (VIM(AUTOREGRESSIVE.model, text=each, **size) for each in (text, None))
    assert code_flops(told, 5) == code_flops(labelled, 5 + 8)


def test_a_consistency_model_is_its_own_teacher(run: RunConfig, device: Device) -> None:
    sample = DiffusionSampleConfig(batch_size=2, num_steps=2, solver="consistency", steps="karras")
    usual, both = (
        diffusion_row(run, device, replace(DIFFUSION, objective=ObjectiveConfig(kind=kind), sample=each))
        for kind, each in (("denoising", DIFFUSION.sample), ("consistency", sample))
    )
    assert both["flops_per_image"] == pytest.approx(usual["flops_per_image"] * 4 / 3, abs=3)


def diffusion_row(run: RunConfig, device: Device, config: DiffusionConfig) -> dict[str, Any]:
    """The row of a training step."""
    tokenizer, bench = Tokenizer(TOKENIZER.model, image_size=16).eval(), Bench(run, device, seconds=0.02)
    shards, _ = usable_shards(run, tokenizer, ("a", "b"), run.folder / "random")
    measure_diffusion_step(bench, config, shards, tokenizer)
    return bench.rows[0]


def tokenizer_row(run: RunConfig, device: Device, config: TokenizerConfig) -> dict[str, Any]:
    bench = Bench(run, device, seconds=0.02)
    measure_tokenizer(bench, config, open_images(DataConfig(size=16), "test"))
    return bench.rows[0]


SMALL = DiscriminatorConfig(channels=8, channel_base=128)


def test_an_opponent_that_begins_late_is_timed_as_one_that_plays(
    run: RunConfig, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def watched(*arguments: Any) -> nn.Module:
        network = build_discriminator(*arguments)
        network.register_forward_hook(lambda *_: calls.append(1))
        return network

    monkeypatch.setattr("tokenizer.train.build_discriminator", watched)
    late = replace(SMALL, start_step=20_000, start_patience=100)
    tokenizer_row(run, device, replace(TOKENIZER, loss=TokenizerLossConfig(adversarial=0.1), discriminator=late))
    assert len(calls) >= 2 * (WARM_UP + LEAST)  # it teaches and learns in every step


def test_a_step_counts_all_that_it_computes(tmp_path: Path) -> None:
    model, image = Tokenizer(TOKENIZER.model, image_size=16), torch.empty(1, 3, 16, 16)
    with torch.device("meta"):
        network, opponent = open_perceptual("lpips:vgg", blank=True), build_discriminator(SMALL, 16)
    loss = TokenizerLossConfig(perceptual=0.1, perceptual_network=f"lpips:vgg:{tmp_path / 'absent'}")
    config, own = replace(TOKENIZER, loss=loss, discriminator=SMALL), 3 * forward_flops(model, image)
    perceptual = 1.5 * forward_flops(network, image, image)
    assert 3 * step_flops(model, TOKENIZER) == own
    assert 3 * step_flops(model, config) == pytest.approx(own + perceptual, abs=3)
    both = replace(config, loss=replace(loss, adversarial=0.1))
    adversarial = passes_per_step(SMALL) * forward_flops(opponent, image)
    assert 3 * step_flops(model, both) == pytest.approx(own + perceptual + adversarial, abs=3)


def test_a_frozen_encoder_is_measured_frozen(run: RunConfig, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    learning: list[set[str]] = []

    def watched(model: Tokenizer, *arguments: Any, **options: Any) -> TokenizerTask:
        learning.append({name.split(".")[0] for name, value in model.named_parameters() if value.requires_grad})
        return TokenizerTask(model, *arguments, **options)

    monkeypatch.setattr("eval.speed.TokenizerTask", watched)
    rows = [tokenizer_row(run, device, each) for each in (TOKENIZER, replace(TOKENIZER, encoder_from="elsewhere"))]
    assert learning == [{"encoder", "quantizer", "decoder"}, {"decoder"}]
    assert [row["note"] for row in rows] == ["", "the decoder alone learns"]
    model = Tokenizer(TOKENIZER.model, image_size=16)
    forward = forward_flops(model, torch.empty(1, 3, 16, 16))
    decoder = forward_flops(model.decoder, torch.empty(1, 16, 4))
    assert rows[0]["flops_per_image"] == 3 * forward
    assert rows[1]["flops_per_image"] == pytest.approx(forward + 2 * decoder, abs=3)


class Line(Task):
    """y = 2 x, learnt by one weight."""

    def __init__(self) -> None:
        self.modules = {"line": nn.Linear(1, 1, bias=False)}
        self.optimizers = {"line": torch.optim.AdamW(self.modules["line"].parameters())}
        for group in self.optimizers["line"].param_groups:
            group["peak_lr"] = group["lr"]
        self.after: list[int] = []

    def step(self, batch: dict[str, Tensor], rng: object) -> dict[str, Tensor]:
        return {"loss": (self.modules["line"](batch["x"]) - 2 * batch["x"]).square().mean()}

    def after_step(self, step: int, metrics: dict[str, float], rng: object) -> None:
        self.after.append(step)


class Numbers:
    def __len__(self) -> int:
        return 8

    def load(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, Tensor]:
        return {"x": torch.from_numpy(indices)[:, None].float()}


def test_steps_are_those_of_the_training_loop(run: RunConfig, device: Device) -> None:
    task = Line()
    before = task.modules["line"].weight.item()
    times = time_steps(task, Numbers(), train=TRAIN, run=run, device=device, seconds=0.0)
    assert task.modules["line"].weight.item() != before
    assert len(times) == LEAST and min(times) > 0
    assert task.after == list(range(WARM_UP + LEAST))
    assert not run.folder.exists()


def test_calls_are_repeated_until_time_is_over(device: Device) -> None:
    calls: list[int] = []
    times = time_calls(lambda: calls.append(1), device=device, seconds=1e-3)
    assert sum(times) >= 1e-3 and len(calls) == len(times) + WARM_UP


@pytest.mark.parametrize(
    ("most", "batch_size", "accumulate"), [(1000, 64, 4), (16, 32, 2), (9, 16, 1), (3, 6, 1), (0.2, 2, 1)]
)
def test_a_long_step_is_cut_to_fewer_parts_then_to_smaller_ones(most: float, batch_size: int, accumulate: int) -> None:
    train = smaller_batch(TrainConfig(batch_size=64, accumulate=4), 2, most)
    assert (train.batch_size, train.accumulate) == (batch_size, accumulate)


@pytest.mark.parametrize("seen", [1, 12.5, 24])
def test_one_more_code_attends_to_what_stands(seen: float) -> None:
    network = VIM(AUTOREGRESSIVE.model, vocab_size=32, length=24, num_classes=3)
    matrices = 12 * 16**2 + 32 * 16
    assert code_flops(network, seen) == 2 * matrices + 4 * seen * 16


def test_guidance_takes_a_second_row_up_to_the_last_guided_code() -> None:
    for settings, rows in (
        (AutoregressiveSampleConfig(), 1),
        (AutoregressiveSampleConfig(guidance=2.0), 2),
        (AutoregressiveSampleConfig(guidance=2.0, guidance_schedule="linear"), 2),
        (AutoregressiveSampleConfig(guidance=2.0, guidance_start=0.25, guidance_stop=0.5), 1.5),
    ):
        assert rows_per_image(settings, 16) == rows


def autoregressive_row(run: RunConfig, device: Device, folder: Path, **changes: Any) -> dict[str, Any]:
    """The row of a training step, and the tokenizer's forward operations."""
    tokenizer = Tokenizer(TOKENIZER.model, image_size=16).eval()
    shards, _ = usable_shards(run, tokenizer, ("a", "b"), folder)
    bench = Bench(run, device, seconds=0.02)
    measure_autoregressive_step(bench, replace(AUTOREGRESSIVE, **changes), shards, tokenizer)
    return bench.rows[0]


def test_a_step_that_encodes_its_images_counts_the_encoder(run: RunConfig, device: Device, tmp_path: Path) -> None:
    usual = autoregressive_row(run, device, tmp_path / "usual")
    fly = autoregressive_row(run, device, tmp_path / "fly", codes="on_the_fly")
    assert (usual["note"], fly["note"]) == ("", "encodes its images, in fp32")
    encoder = encode_flops(Tokenizer(TOKENIZER.model, image_size=16).eval())
    assert fly["flops_per_image"] - usual["flops_per_image"] == pytest.approx(encoder, abs=3)


def test_sampling_in_bf16_is_measured_against_bf16_products(run: RunConfig, device: Device, tmp_path: Path) -> None:
    tokenizer = Tokenizer(TOKENIZER.model, image_size=16)
    config = replace(AUTOREGRESSIVE, sample=AutoregressiveSampleConfig(batch_size=2, precision="bf16"))
    shards, _ = usable_shards(run, tokenizer, ("a", "b"), tmp_path)
    bench = Bench(run, device, seconds=0.02)
    measure_decoding(bench, config, generator_card(config, shards, tokenizer))
    assert bench.rows[0]["dtype"] == "bfloat16" and bench.rows[0]["ratio"] > 0


def test_a_runs_own_codes_are_read_if_they_fit(run: RunConfig, tmp_path: Path) -> None:
    tokenizer = Tokenizer(TOKENIZER.model, image_size=16)
    shards, origin = usable_shards(run, tokenizer, ("a", "b"), tmp_path / "random")
    assert origin == "random codes" and shards.meta["class_names"] == ["a", "b"]
    (run.folder / "codes").mkdir(parents=True)
    (tmp_path / "random").rename(run.folder / "codes" / "train")
    _, origin = usable_shards(run, tokenizer, ("a", "b"), tmp_path / "more")
    assert origin == f"from {run.folder / 'codes' / 'train'}" and not (tmp_path / "more").exists()
    other = Tokenizer(replace(TOKENIZER.model, vocab_size=8), image_size=16)
    assert usable_shards(run, other, (), tmp_path / "more")[1] == "random codes"
    assert (open_shards(tmp_path / "more").labels == -1).all()


def test_random_images_have_the_shape_of_real_ones() -> None:
    batch = RandomImages(8).load(np.arange(3))
    assert batch["images"].shape == (3, 3, 8, 8) and batch["images"].dtype == torch.uint8
    assert not torch.equal(batch["images"][0], batch["images"][1])


def test_listed_steps_count_and_another_network_that_guides_is_left_out(run: RunConfig, device: Device) -> None:
    sample = DiffusionSampleConfig(
        batch_size=2, solver="dpmpp_2m", steps="list", levels=(-5.0, 0.0, 5.0), guidance=2.0, guide="elsewhere"
    )
    diffusion = replace(DIFFUSION, weight="learned", sample=sample)
    rows = speed(
        run=run, data=DataConfig(size=16), tokenizer=TOKENIZER, autoregressive=None, diffusion=diffusion,
        device=device, seconds=0.4,
    )  # fmt: skip
    row = next(row for row in rows if row["name"] == "diffusion sampling")
    assert "3 steps of 3 with dpmpp_2m" in row["note"] and "without its guide" in row["note"]
    assert any(row["name"] == "diffusion step" for row in rows)
