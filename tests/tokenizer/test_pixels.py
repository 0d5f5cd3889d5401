"""Pixels as latents: nothing is learnt, nothing is lost, and every later stage runs on them unchanged."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import DataConfig, RunConfig, TrainConfig
from engine.device import Device, setup
from engine.images import ImageSet, to_float
from engine.shards import open_shards
from tokenizer.config import QuantizerConfig, TokenizerConfig, TokenizerModelConfig, TowerConfig
from tokenizer.encode import encode_images
from tokenizer.model import Tokenizer, code_fingerprint, count_parameters, load_tokenizer
from tokenizer.reconstruct import reconstruct
from tokenizer.train import measure_latents, train_tokenizer
from tokenloom.dry_run import dry_run
from tokenloom.experiment import load_experiment
from tokenloom.pipeline import run_all

PIXELS = TokenizerModelConfig(architecture="pixels")
CONFIG = TokenizerConfig(model=PIXELS)
DATA = DataConfig(source="digits", size=12, workers=1)
YAML = Path(__file__).parents[2] / "configs" / "pixels.yaml"


@pytest.fixture
def device() -> Device:
    return setup(RunConfig(device="cpu", precision="fp32", threads=1))


@pytest.fixture
def pixels() -> Tokenizer:
    return Tokenizer(PIXELS, image_size=16).eval()


def run_in(root: Path) -> RunConfig:
    return RunConfig(name="run", root=str(root), device="cpu", precision="fp32")


def test_latents_are_the_pixels_normalised(pixels: Tokenizer, images: torch.Tensor) -> None:
    pixels.latent_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
    pixels.latent_std.copy_(torch.tensor([0.5, 0.25, 2.0]))
    expected = (images.double() / 127.5 - 1 - pixels.latent_mean.view(3, 1, 1)) / pixels.latent_std.view(3, 1, 1)
    latents = pixels.to_latents(images)
    assert latents.dtype == torch.float32 and torch.allclose(latents.double(), expected, atol=1e-6)
    assert pixels.latent_shape == (3, 16, 16) and pixels.grid == (16, 16) and pixels.length == 256
    assert pixels.vocab_size == count_parameters(pixels) == 0


@pytest.mark.parametrize("kind", ["per_channel", "static"])
def test_every_value_of_a_pixel_survives(
    kind: str, pixels: Tokenizer, images: torch.Tensor, squares: ImageSet, device: Device
) -> None:
    measure_latents(pixels, squares, kind=kind, device=device, batch_size=16)
    values = torch.arange(3 * 256).view(1, 256, 3).transpose(1, 2).reshape(1, 3, 16, 16).remainder(256).byte()
    assert all(channel.unique().numel() == 256 for channel in values[0])
    for given in (values, images):
        latents = pixels.to_latents(given)
        assert torch.equal(pixels.from_latents(latents), given)
        assert torch.equal(pixels.from_latents(latents.half()), given)  # as they lie on disk
        made, codes = pixels.reconstruct(given)
        assert torch.equal(made, given) and codes is None
    output, codes, losses, _ = pixels(to_float(images))
    assert torch.equal(output, to_float(images)) and codes is None and not losses
    batch = next(reconstruct(pixels, squares))
    assert torch.equal(batch.originals, batch.reconstructions)


def test_there_are_no_codes(pixels: Tokenizer, images: torch.Tensor) -> None:
    codes, latents = pixels.codes_and_latents(images)
    assert codes is None and torch.equal(latents, pixels.to_latents(images))
    asked = (pixels.encode, images), (pixels.decode, torch.zeros(1, 256).long()), (pixels.latents_to_codes, latents)
    for ask, given in asked:
        with pytest.raises(ValueError, match=r"architecture=pixels has latents but no codes.*diffusion"):
            ask(given)


def test_the_only_tap_is_the_mean_colour(pixels: Tokenizer, images: torch.Tensor) -> None:
    assert pixels.taps == ("pre_quant",)
    features = pixels.features(images, pixels.taps)["pre_quant"]
    assert torch.allclose(features, to_float(images).mean(dim=(2, 3)), atol=1e-6)


@pytest.mark.parametrize("kind", ["per_channel", "static"])
def test_latents_on_disk_are_normalised_over_the_training_images(kind: str, tmp_path: Path, device: Device) -> None:
    run, config = run_in(tmp_path), TokenizerConfig(model=PIXELS, latent_statistics=kind)
    train_tokenizer(run=run, data=DATA, tokenizer=config, device=device)
    encode_images(run=run, data=DATA, tokenizer=config, device=device, splits=("train",))
    model = load_tokenizer(run.folder)
    shards = open_shards(run.folder / "codes" / "train", fingerprint=model.code_fingerprint)
    latents = shards.load(np.arange(len(shards)))["latents"].double()  # [N, 3, 12, 12]
    if kind == "per_channel":
        assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-3
        assert (latents.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-3
    else:
        assert latents.square().mean().sqrt() == pytest.approx(1, abs=1e-3)
        assert not model.latent_mean.any() and model.latent_std.unique().numel() == 1


def test_the_stage_is_measured_not_trained(tmp_path: Path, device: Device, capsys: pytest.CaptureFixture) -> None:
    run = run_in(tmp_path)
    folder = train_tokenizer(run=run, data=DATA, tokenizer=CONFIG, device=device)
    assert "pixels have nothing to train; measuring mean and deviation over 1,438 images" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"identity.json", "model.json", "model.safetensors"}
    card, written = json.loads((folder / "model.json").read_text()), (folder / "model.json").stat().st_mtime_ns
    assert card["config"] == {"model": {"architecture": "pixels"}, "quantizer": {}, "image_size": 12}
    first = load_tokenizer(run.folder)
    assert first.code_fingerprint == code_fingerprint(first) and first.config == PIXELS
    train_tokenizer(run=run, data=DATA, tokenizer=CONFIG, device=device)
    assert (folder / "model.json").stat().st_mtime_ns == written
    static = TokenizerConfig(model=PIXELS, latent_statistics="static")
    train_tokenizer(run=run, data=DATA, tokenizer=static, device=device)
    assert load_tokenizer(run.folder).code_fingerprint != first.code_fingerprint
    tower = TowerConfig(blocks=1, width=8, heads=2, mlp=8)
    learned = TokenizerModelConfig(patch_size=4, code_dim=2, vocab_size=4, encoder=tower, decoder=tower)
    with pytest.raises(ValueError, match="was begun with another configuration"):
        train_tokenizer(run=run, data=DATA, tokenizer=TokenizerConfig(model=learned), device=device)


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.model\.patch_size=4, tokenizer\.train\.steps=3: no effect"):
        TokenizerConfig(model=TokenizerModelConfig(architecture="pixels", patch_size=4), train=TrainConfig(steps=3))
    with pytest.raises(ValueError, match=r"tokenizer\.quantizer\.kind=kl: no effect.*architecture=pixels"):
        TokenizerConfig(model=PIXELS, quantizer=QuantizerConfig(kind="kl"))
    with pytest.raises(ValueError, match=r"tokenizer\.encoder_from=runs/a: no effect"):
        TokenizerConfig(model=PIXELS, encoder_from="runs/a")
    assert TokenizerConfig(model=PIXELS, latent_statistics="static", views=3, encode_batch_size=7)


SMALL = (
    *("--data.size=16", "--tokenizer.views=2", "--diffusion.model={depth: 1, width: 48, heads: 2}"),
    *("--diffusion.train={steps: 4, batch_size: 8, preview_every: 4}", "--diffusion.sample={num_steps: 2}"),
    *("--eval={num_samples: 40, features: [random]}",),
    *("--eval.probe={num_train: 60, num_test: 40, c_grid: [0.01]}", "--run.device=cpu", "--run.threads=1"),
)


def test_every_stage_runs_on_pixels(tmp_path: Path, device: Device) -> None:
    experiment = load_experiment(["--config", str(YAML), *SMALL, f"--run.root={tmp_path}"])
    told = dry_run(experiment)
    assert "latents are the pixels" in told and "tokens per image" in told and "16" in told
    report = run_all(experiment, device)
    assert report is not None and report.is_file()
    records = json.loads((experiment.run.folder / "eval" / "metrics.json").read_text())
    scores = {(entry["subject"], entry["name"]): entry["value"] for entry in records}
    assert scores["tokenizer", "psnr"] == 100 and scores["tokenizer", "ssim"] == pytest.approx(1)
    assert scores["tokenizer", "rfd_random"] == pytest.approx(0, abs=1e-6)
    assert {("diffusion", "fd_random"), ("diffusion", "probe_top1"), ("tokenizer", "probe_top1")} <= scores.keys()
