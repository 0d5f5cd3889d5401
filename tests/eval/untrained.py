"""A whole run of untrained models on the digits: what is scored means nothing, how it is scored matters."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import yaml

from engine.checkpoint import save_model
from engine.config import DataConfig, RunConfig, TrainConfig, to_dict
from engine.device import setup
from eval.config import ClassifierConfig, EvalConfig, ProbeConfig
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


def make_run(root: Path, *, num_classes: int = 10) -> RunConfig:
    """A run folder with an untrained tokenizer and generators for 16 x 16 digits."""
    run = RunConfig(name="digits", root=str(root), device="cpu", precision="fp32", threads=1)
    torch.manual_seed(0)
    tokenizer = Tokenizer(MODEL, image_size=16)
    save_model(run.folder / "tokenizer", tokenizer.state_dict(), model_card(tokenizer))
    names = list("0123456789")[:num_classes]
    facts = {"num_classes": num_classes, "class_names": names, "grid": [4, 4], "vocab_size": 32}
    for (family, config), build in zip(FAMILIES.items(), (build_network, build_denoiser), strict=True):
        told = {key: value for key, value in dataclasses.asdict(config).items() if key not in ("train", "sample")}
        card = {**facts, "kind": "generator", "family": family, "config": told, "latent_shape": [4, 4, 4]}
        card["sample"] = dataclasses.asdict(config.sample)
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


def write_yaml(path: Path, config: EvalConfig = EVAL) -> Path:
    """The experiment of `make_run`, for the command line."""
    sections = {"tokenizer": {"model": to_dict(MODEL)}, **{name: to_dict(each) for name, each in FAMILIES.items()}}
    run = {"name": "digits", "device": "cpu", "precision": "fp32", "threads": 1}
    path.write_text(yaml.safe_dump({"run": run, "data": {"size": 16}, **sections, "eval": to_dict(config)}))
    return path
