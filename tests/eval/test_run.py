"""A whole run of untrained models is scored; what matters here is what is measured, on what, and how it is kept."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import save_model
from engine.config import DataConfig, RunConfig, TrainConfig
from engine.device import setup
from eval.config import ClassifierConfig, EvalConfig, ProbeConfig
from eval.protocol import read_scores
from eval.run import evaluate
from generator.autoregressive import build_network
from generator.config import (
    AutoregressiveConfig,
    AutoregressiveModelConfig,
    AutoregressiveSampleConfig,
    DenoiserModelConfig,
    DiffusionConfig,
    DiffusionSampleConfig,
)
from generator.diffusion import build_denoiser
from tokenizer.config import TokenizerConfig, TokenizerModelConfig, TowerConfig
from tokenizer.model import Tokenizer, code_fingerprint, model_card

TOWER = TowerConfig(blocks=1, width=16, heads=2, mlp=32)
MODEL = TokenizerModelConfig(patch_size=4, vocab_size=32, code_dim=4, encoder=TOWER, decoder=TOWER)
FAMILIES = {
    "autoregressive": AutoregressiveConfig(
        model=AutoregressiveModelConfig(preset="tiny", depth=1, width=16, heads=2),
        sample=AutoregressiveSampleConfig(batch_size=24),
    ),
    "diffusion": DiffusionConfig(
        model=DenoiserModelConfig(preset="tiny", depth=1, width=16, heads=2),
        sample=DiffusionSampleConfig(num_steps=2, batch_size=24),
    ),
}
EVAL = EvalConfig(
    num_samples=24,
    num_reconstructions=32,
    classifier=ClassifierConfig(widths=(8, 8, 8), train=TrainConfig(steps=2, batch_size=8, preview_every=0)),
    probe=ProbeConfig(num_train=60, num_test=40, c_grid=(0.01, 1.0)),
)


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """A run folder with an untrained tokenizer and generators for 16 x 16 digits."""
    run = RunConfig(name="digits", root=str(tmp_path), device="cpu", precision="fp32", threads=1)
    torch.manual_seed(0)
    tokenizer = Tokenizer(MODEL, image_size=16)
    save_model(run.folder / "tokenizer", tokenizer.state_dict(), model_card(tokenizer))
    facts = {"num_classes": 10, "class_names": list("0123456789"), "grid": [4, 4], "vocab_size": 32}
    for (family, config), build in zip(FAMILIES.items(), (build_network, build_denoiser), strict=True):
        told = {key: value for key, value in dataclasses.asdict(config).items() if key not in ("train", "sample")}
        card = {**facts, "kind": "generator", "family": family, "config": told, "latent_shape": [4, 4, 4]}
        card["tokenizer_fingerprint"] = code_fingerprint(tokenizer)
        save_model(run.folder / family, build(config.model, card).state_dict(), card)
    return run


def scores(run: RunConfig, only: str | None = None, config: EvalConfig = EVAL, **changes: Any) -> dict[tuple, dict]:
    arguments: dict[str, Any] = {
        "data": DataConfig(size=16),
        "tokenizer": TokenizerConfig(model=MODEL),
        **FAMILIES,
        "eval": config,
        "device": setup(run),
        "only": only,
    }
    found = evaluate(run=run, **{**arguments, **changes})
    return {(entry["subject"], entry["name"]): entry for entry in found}


def test_everything_a_run_has_is_scored_and_kept(run: RunConfig, capsys: pytest.CaptureFixture) -> None:
    found = scores(run)
    judged = {"fd_classifier", "is_classifier", "fd_random", "kid", "precision", "recall"}
    expected = {("real", name) for name in judged}
    expected |= {(family, name) for family in FAMILIES for name in judged | {"class_accuracy", "probe_top1"}}
    expected |= {("tokenizer", name) for name in ("psnr", "ssim", "usage", "perplexity", "probe_top1")}
    expected |= {("tokenizer", "rfd_classifier"), ("tokenizer", "rfd_random")}
    expected |= {("autoregressive", "nll"), ("pixels", "probe_top1")}
    assert set(found) == expected
    assert not any(name in ("fid", "rfid", "is") for _, name in found)
    assert len(read_scores(run.folder / "eval" / "metrics.json")) == len(expected)
    assert "kid (classifier)" in capsys.readouterr().out
    real, made = found["real", "fd_random"], found["diffusion", "fd_random"]
    assert real["protocol"]["hash"] == made["protocol"]["hash"]
    assert real["value"] < made["value"]
    assert made["n"] == made["protocol"]["num_real"] == 24
    assert made["protocol"]["subject"]["seeds"] == [0, 23]
    assert made["protocol"]["subject"]["settings"]["num_steps"] == 2
    assert found["tokenizer", "psnr"]["n"] == 32


def test_probe_keeps_the_whole_curve(run: RunConfig) -> None:
    found = scores(run, "probe")
    kept = json.loads((run.folder / "eval" / "probe.json").read_text())
    assert [(row["family"], row["tap"]) for row in kept["curve"]] == [
        ("pixels", "pixels"),
        ("tokenizer", "encoder.0"),
        ("tokenizer", "codes"),
        ("autoregressive", found["autoregressive", "probe_top1"]["tap"]),
        ("diffusion", found["diffusion", "probe_top1"]["tap"]),
    ]
    assert found["pixels", "probe_top1"]["value"] > 0.5
    assert found["tokenizer", "probe_top1"]["protocol"]["num_real"] == 40


def test_samples_that_fit_are_used_and_others_are_made_again(run: RunConfig) -> None:
    scores(run, "fid", diffusion=None)
    first = run.folder / "samples" / "autoregressive" / "000000.png"
    stamp = first.stat().st_mtime_ns
    fewer = dataclasses.replace(EVAL, num_samples=20)
    scores(run, "fid", fewer, diffusion=None)
    assert first.stat().st_mtime_ns == stamp
    hotter = dataclasses.replace(FAMILIES["autoregressive"], sample=AutoregressiveSampleConfig(temperature=2.0))
    scores(run, "fid", diffusion=None, autoregressive=hotter)
    assert first.stat().st_mtime_ns != stamp


def test_same_run_gives_the_same_scores(run: RunConfig) -> None:
    config = dataclasses.replace(EVAL, features=("random",))
    assert scores(run, "reconstruction", config) == scores(run, "reconstruction", config)


def test_a_generator_that_is_not_trained_yet_is_left_out(run: RunConfig, capsys: pytest.CaptureFixture) -> None:
    (run.folder / "diffusion" / "model.json").unlink()
    assert not any(subject == "diffusion" for subject, _ in scores(run, "fid"))
    assert "diffusion left out" in capsys.readouterr().out


def test_refusals(run: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"num_samples=800: .* the train split has 1438; set --eval.num_samples=719"):
        scores(run, "fid", dataclasses.replace(EVAL, num_samples=800, features=("random",)), autoregressive=None)
    with pytest.raises(ValueError, match="FID needs the Inception weights"):
        scores(run, "fid", dataclasses.replace(EVAL, features=("inception",), inception_weights="absent.pth"))
    with pytest.raises(ValueError, match=r"none is a tap of tokenizer"):
        scores(run, "probe", dataclasses.replace(EVAL, probe=dataclasses.replace(EVAL.probe, taps=("encoder.9",))))
    with pytest.raises(ValueError, match="only='speed' must be"):
        scores(run, "speed")


def test_a_generator_of_another_tokenizer_is_not_probed(run: RunConfig) -> None:
    torch.manual_seed(1)
    tokenizer = Tokenizer(MODEL, image_size=16)
    save_model(run.folder / "tokenizer", tokenizer.state_dict(), model_card(tokenizer))
    with pytest.raises(ValueError, match="learned from codes"):
        scores(run, "probe")
