"""The dry run tells the sizes of the networks that would be trained, and touches neither data nor run folder."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import DataConfig, TrainConfig
from engine.device import setup
from engine.flops import forward_flops, saved_bytes
from generator.condition_config import ConditionConfig, TextConfig
from generator.config import (
    AutoregressiveConfig,
    AutoregressiveModelConfig,
    CurriculumConfig,
    DenoiserModelConfig,
    DiffusionConfig,
    DiffusionSampleConfig,
    OrderConfig,
    ScheduleConfig,
)
from generator.consistency_config import ObjectiveConfig
from generator.learned_config import LearnedScheduleConfig
from generator.learned_schedule import rate_flops
from tokenizer.config import QuantizerConfig, TokenizerConfig, TokenizerLossConfig, TokenizerModelConfig
from tokenizer.encode import encode_flops
from tokenizer.model import Tokenizer, count_parameters
from tokenizer.perceptual import open_perceptual
from tokenloom.dry_run import Stage, Trained, build_stages, dry_run, encoded_splits, memory, quantity, stage_facts
from tokenloom.experiment import Experiment, load_experiment
from tokenloom.pipeline import check

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"


@pytest.fixture(scope="module")
def read() -> Experiment:
    return load_experiment(["--config", str(DIGITS), "--run.precision=fp32"])


@pytest.fixture
def digits(read: Experiment, tmp_path: Path) -> Experiment:
    return dataclasses.replace(read, run=dataclasses.replace(read.run, root=str(tmp_path)))


def cells(text: str, name: str) -> list[str]:
    """The cells of a row of the table."""
    line = next(line for line in text.splitlines() if line.startswith(name))
    return [cell.strip() for cell in line[len(name) :].split("  ") if cell.strip()]


def test_it_tells_what_training_would_use(digits: Experiment) -> None:
    text = dry_run(digits)
    tokenizer = Tokenizer(digits.tokenizer.model, image_size=32)
    assert cells(text, "parameters")[0] == quantity(count_parameters(tokenizer))
    assert cells(text, "tokens per image") == ["16", "16", "16"]
    train = [section.train for section in (digits.tokenizer, digits.autoregressive, digits.diffusion) if section]
    assert cells(text, "steps x batch") == [f"{each.steps:,} x {each.batch_size:,}" for each in train]
    assert cells(text, "images seen") == [quantity(each.steps * each.batch_size) for each in train]
    weights = cells(text, "  weights, gradients, AdamW, EMA")
    assert weights[0] == memory(20 * count_parameters(tokenizer))
    assert "10 classes (as in the data)" in text


def test_it_writes_nothing_and_says_where_results_will_lie(digits: Experiment) -> None:
    text = dry_run(digits)
    assert not digits.run.folder.exists()
    assert f"results in {digits.run.folder}/ (new)" in text
    assert "autoregressive/  diffusion/" in text


def test_absent_families_are_left_out(digits: Experiment) -> None:
    text = dry_run(dataclasses.replace(digits, autoregressive=None))
    assert "autoregressive" not in text and "diffusion" in text


def test_data_need_not_be_there(digits: Experiment) -> None:
    elsewhere = dataclasses.replace(digits, data=DataConfig(source="folder", path="/not/here", size=32))
    assert "1,000 classes (assumed" in dry_run(elsewhere)


def test_processes_share_the_batch_and_under_fsdp_the_weights(
    digits: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = dry_run(digits)
    monkeypatch.setenv("WORLD_SIZE", "4")
    copies = dry_run(digits)
    shards = dry_run(dataclasses.replace(digits, run=dataclasses.replace(digits.run, parallel="fsdp")))
    assert cells(alone, "  images at a time")[0] == "64" and cells(copies, "  images at a time")[0] == "16"
    state = "  weights, gradients, AdamW, EMA"
    assert cells(copies, state) == cells(alone, state) != cells(shards, state)
    parameters = count_parameters(Tokenizer(digits.tokenizer.model, image_size=32))
    assert cells(shards, state)[0] == memory(20 * parameters / 4)
    assert "4 processes (fsdp)" in shards


def test_a_batch_that_processes_cannot_share_is_refused(digits: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"batch_size=64 must be a multiple of processes x train.accumulate = 3"):
        dry_run(digits)


def test_accumulation_and_a_missing_average_save_memory(digits: Experiment) -> None:
    train = TrainConfig(batch_size=64, accumulate=8, ema=0.0)
    text = dry_run(dataclasses.replace(digits, tokenizer=dataclasses.replace(digits.tokenizer, train=train)))
    assert cells(text, "  images at a time") == ["8", "64", "64"]
    parameters = count_parameters(Tokenizer(digits.tokenizer.model, image_size=32))
    assert cells(text, "  weights, gradients, AdamW, EMA")[0] == memory(16 * parameters)


def with_diffusion(experiment: Experiment, **changes: Any) -> Experiment:
    assert experiment.diffusion is not None
    return dataclasses.replace(experiment, diffusion=dataclasses.replace(experiment.diffusion, **changes))


def test_it_tells_how_long_a_curriculum_takes_at_least(digits: Experiment) -> None:
    assert digits.diffusion is not None
    steps = digits.diffusion.train.steps
    easy = CurriculumConfig(kind="easy_to_hard", num_clusters=10, patience=3)
    told = f"the curriculum takes at least 45 of the {steps:,} diffusion steps before the last of its 10 stages"
    assert told in dry_run(with_diffusion(digits, curriculum=easy))
    assert "curriculum" not in dry_run(digits)


def test_clusters_that_the_schedule_does_not_fill_are_refused_before_any_training(digits: Experiment) -> None:
    """DDPM moved far towards data has no draws at high noise."""
    curriculum = CurriculumConfig(clusters="noise_level")
    wanting = with_diffusion(digits, schedule=ScheduleConfig(kind="ddpm", location=40.0), curriculum=curriculum)
    said = r"curriculum\.clusters=noise_level with num_clusters=20 leaves clusters .*: use fewer, or clusters=time"
    with pytest.raises(ValueError, match=said):
        dry_run(wanting)
    with pytest.raises(ValueError, match=said):
        check(wanting, setup(digits.run))


# Peebles & Xie (2023), table 1: parameters in millions, operations in billions of multiply-adds.
DENOISERS = [("S", 33, 6.06), ("B", 130, 23.01), ("L", 458, 80.71), ("XL", 675, 118.64)]


@pytest.mark.parametrize(("preset", "parameters", "multiply_adds"), DENOISERS)
def test_denoisers_have_their_published_sizes(preset: Any, parameters: float, multiply_adds: float) -> None:
    stage = published(diffusion=DiffusionConfig(model=DenoiserModelConfig(preset=preset, patch_size=2)))
    assert stage.tokens == 256
    assert count_parameters(stage.network) / 1e6 == pytest.approx(parameters, rel=0.015)
    assert forward_flops(stage.network, *stage.inputs) / 2e9 == pytest.approx(multiply_adds, rel=0.01)


# ViT-VQGAN (Yu et al., 2022; second-hand), in millions; its count leaves out a little more than ours.
@pytest.mark.parametrize(("preset", "parameters"), [("vim-base", 650), ("vim-large", 1697)])
def test_transformers_have_their_published_sizes(preset: Any, parameters: float) -> None:
    model = AutoregressiveModelConfig(preset=preset)
    stage = published(autoregressive=AutoregressiveConfig(model=model))
    assert count_parameters(stage.network) / 1e6 == pytest.approx(parameters, rel=0.1)
    depth, width, _ = model.shape
    matrices = depth * 12 * width**2 + 8192 * width
    attention = depth * 4 * 1024**2 * width
    assert forward_flops(stage.network, *stage.inputs) == 2 * 1024 * matrices + attention


def published(**family: Any) -> Stage:
    """The generator of a ViT-VQGAN at 256 pixels with latents as DiT's, 4 channels on a grid of 32 x 32."""
    tokenizer = TokenizerConfig(model=TokenizerModelConfig(preset="base-base", code_dim=4))
    experiment = Experiment(data=DataConfig(size=256), tokenizer=tokenizer, **family)
    with torch.device("meta"):
        return list(build_stages(experiment, 1000))[1]


def told_of(experiment: Experiment, family: str, kind: Any) -> tuple[Stage, Stage, str]:
    """The stage of a family told a class, that of one told something else, and what the dry run says of the latter."""
    section = dataclasses.replace(getattr(experiment, family), condition=ConditionConfig(kind=kind))
    told = dataclasses.replace(experiment, **{family: section})
    with torch.device("meta"):
        usual, stage = ({each.name: each for each in build_stages(run, 10)}[family] for run in (experiment, told))
    return usual, stage, dry_run(told)


@pytest.mark.parametrize(("place", "family"), [(1, "autoregressive"), (2, "diffusion")])
def test_a_text_and_its_encoder_are_counted(digits: Experiment, place: int, family: str) -> None:
    usual, stage, text = told_of(digits, family, "text")
    encoder, (*_, ids) = stage.network.text, stage.inputs
    assert ids.shape == (1, TextConfig().length)
    forward = forward_flops(stage.network, *stage.inputs)
    assert forward > forward_flops(usual.network, *usual.inputs) + forward_flops(encoder, ids)
    assert cells(text, "forward per image")[place] == quantity(forward, "FLOP")
    labels = 11 * stage.network.summary.out_features
    grown = count_parameters(stage.network) - count_parameters(usual.network)
    named = dict(stage.network.named_parameters())
    own = [named[name].numel() for name in named if any(part in name for part in ("cross", "summary", "gate"))]
    assert grown == count_parameters(encoder) - labels + sum(own)
    assert any("cross" in name for name in named) == (family == "diffusion") and "frozen text encoder" not in text


def test_an_image_doubles_the_channels_of_the_patches(digits: Experiment) -> None:
    usual, stage, text = told_of(digits, "diffusion", "image")
    patches = usual.network.patches
    assert stage.inputs[2].shape == stage.inputs[0].shape == (1, *stage.network.latent_shape)
    labels = usual.network.labels.weight.numel()
    assert count_parameters(stage.network) - count_parameters(usual.network) == patches.weight.numel() - labels
    assert cells(text, "forward per image")[2] == quantity(forward_flops(stage.network, *stage.inputs), "FLOP")


def test_a_consistency_model_takes_one_more_forward_pass(digits: Experiment) -> None:
    sample = DiffusionSampleConfig(solver="consistency", num_steps=1, steps="karras")
    told = with_diffusion(digits, objective=ObjectiveConfig(kind="consistency"), sample=sample)
    with torch.device("meta"):
        factors = [{each.name: each for each in build_stages(run, 10)}["diffusion"].factor for run in (digits, told)]
    assert factors == [3, 4]


def test_the_rates_of_a_learned_schedule_count(digits: Experiment) -> None:
    sample = DiffusionSampleConfig(solver="ddpm", steps="time")
    found = {}
    for channels in (8, 32):
        learned = LearnedScheduleConfig(per="pixel", channels=channels)
        told = with_diffusion(
            digits, condition=ConditionConfig(kind="image"), sample=sample,
            schedule=ScheduleConfig(kind="learned", learned=learned),
        )  # fmt: skip
        with torch.device("meta"):
            stage = {each.name: each for each in build_stages(told, 10)}["diffusion"]
        rates = rate_flops(stage.network.learned_schedule, stage.inputs[2])  # type: ignore[arg-type]
        assert stage.factor * forward_flops(stage.network, *stage.inputs) == pytest.approx(
            3 * (forward_flops(stage.network, *stage.inputs) + rates)
        )
        found[channels] = saved_bytes(Trained(stage), *stage.inputs), rates
    assert all(small < large for small, large in zip(found[8], found[32], strict=True))


def with_tokenizer(experiment: Experiment, **changes: Any) -> Experiment:
    return dataclasses.replace(experiment, tokenizer=dataclasses.replace(experiment.tokenizer, **changes))


@pytest.mark.parametrize("kind", ["codebook", "kl"])
def test_a_frozen_encoder_counts_forwards_alone(kind: Any, digits: Experiment) -> None:
    digits = with_tokenizer(dataclasses.replace(digits, autoregressive=None), quantizer=QuantizerConfig(kind=kind))
    frozen = with_tokenizer(digits, encoder_from="runs/elsewhere")
    with torch.device("meta"):
        usual, stage = (next(build_stages(each, 10)) for each in (digits, frozen))
    model = stage.network
    forward = forward_flops(model, *stage.inputs)
    decoder = forward_flops(model.decoder, torch.empty(1, 16, model.latent_shape[0]))
    assert usual.factor == 3
    assert stage.factor * forward == pytest.approx(1 * (forward - decoder) + 3 * decoder)
    sizes, learning = count_parameters(model), count_parameters(model.decoder)
    columns = [stage_facts(each, digits.run, 1, "cpu", "fp32") for each in (usual, stage)]
    state, saved = "  weights, gradients, AdamW, EMA", "  saved for the backward pass"
    assert [column[state] for column in columns] == [memory(20 * sizes), memory(8 * sizes + 12 * learning)]
    assert float(columns[1][saved].split()[0]) < 0.6 * float(columns[0][saved].split()[0])
    assert columns[1]["training per image"] == quantity(forward + 2 * decoder, "FLOP")
    told = "encoder and bottleneck are frozen: they count forwards alone"
    assert told in dry_run(frozen) and told not in dry_run(digits)


def with_autoregressive(experiment: Experiment, **changes: Any) -> Experiment:
    assert experiment.autoregressive is not None
    return dataclasses.replace(experiment, autoregressive=dataclasses.replace(experiment.autoregressive, **changes))


def test_codes_on_the_fly_cost_an_encoder_and_its_weights(digits: Experiment) -> None:
    digits = dataclasses.replace(digits, diffusion=None)
    fly = with_autoregressive(digits, codes="on_the_fly")
    with torch.device("meta"):
        tokenizer = Tokenizer(digits.tokenizer.model, image_size=32)
        usual, stage = (list(build_stages(each, 10))[1] for each in (digits, fly))
    forward = forward_flops(stage.network, *stage.inputs)
    assert usual.factor == 3 and stage.factor * forward == pytest.approx(3 * forward + encode_flops(tokenizer))
    assert (usual.beside, stage.beside) == (0, 4 * count_parameters(tokenizer))
    column = stage_facts(stage, digits.run, 1, "cpu", "fp32")
    assert column["training per image"] == quantity(3 * forward + encode_flops(tokenizer), "FLOP")
    weights = 20 * count_parameters(stage.network) + 4 * count_parameters(tokenizer)
    assert column["  weights, gradients, AdamW, EMA"] == memory(weights)


def test_the_training_split_is_encoded_for_whom_it_may_concern(digits: Experiment) -> None:
    fly = with_autoregressive(digits, codes="on_the_fly")
    alone = dataclasses.replace(fly, diffusion=None)
    assert encoded_splits(digits) == encoded_splits(fly) == ("train", "test")
    assert encoded_splits(dataclasses.replace(digits, autoregressive=None, diffusion=None)) == ("train", "test")
    assert encoded_splits(alone) == ("test",)
    text = dry_run(alone)
    assert "codes/test/" in text and "codes/train/" not in text
    assert "each autoregressive step encodes its images" in text


def test_training_in_random_orders_has_a_table_of_sources(digits: Experiment) -> None:
    random = with_autoregressive(digits, order=OrderConfig(kind="random"))
    with torch.device("meta"):
        usual, stage = (list(build_stages(each, 10))[1] for each in (digits, random))
    assert count_parameters(stage.network) - count_parameters(usual.network) == 17 * 256


def test_the_perceptual_network_keeps_its_weights_and_passes_one_image_back(digits: Experiment) -> None:
    loss = TokenizerLossConfig(perceptual=0.1, perceptual_network="lpips:squeeze")
    text = dry_run(with_tokenizer(digits, loss=loss))
    assert "perceptual" in text.splitlines()[3]
    with torch.device("meta"):
        network, pair = open_perceptual("lpips:squeeze", blank=True), [torch.empty(1, 3, 32, 32)] * 2
    assert cells(text, "training per image")[1] == quantity(1.5 * forward_flops(network, *pair), "FLOP")
    assert cells(text, "  weights, gradients, AdamW, EMA")[1] == memory(4 * count_parameters(network))


def test_a_timm_network_is_counted_without_reading_its_file(digits: Experiment, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    for model, options in (("test_resnet", ""), ("test_vit", ":48")):
        loss = TokenizerLossConfig(perceptual=0.1, perceptual_network=f"timm:{model}:{tmp_path / 'a.pth'}{options}")
        experiment = with_tokenizer(digits, loss=loss)
        with pytest.raises(ValueError, match=r"a\.pth: no such weights file"):
            dry_run(experiment)
        (tmp_path / "a.pth").touch()
        assert "perceptual" in dry_run(experiment)
        (tmp_path / "a.pth").unlink()


def test_images_that_the_perceptual_network_cannot_judge_are_refused(digits: Experiment) -> None:
    loss, data = TokenizerLossConfig(perceptual=0.1, perceptual_network="lpips:alex"), DataConfig(size=16)
    experiment = dataclasses.replace(with_tokenizer(digits, loss=loss), data=data)
    with pytest.raises(ValueError, match=r"lpips:alex needs .*31 pixels.*data\.size=16: use .*lpips:vgg"):
        dry_run(experiment)


def test_numbers_are_written_with_three_digits() -> None:
    assert [quantity(value) for value in (0, 7, 999, 1234, 999_900, 2e22)] == ["0", "7", "999", "1.23 k", "1 M", "20 Z"]
    assert quantity(118.64e9, "FLOP") == "119 GFLOP"
    assert memory(3 * 2**20) == "3.0 MiB" and memory(5 * 2**30) == "5.0 GiB"
