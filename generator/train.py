"""Train a generator on the codes or latents of a run."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.batches import Batches, mix
from engine.checkpoint import save_model
from engine.config import DataConfig, RunConfig, to_dict
from engine.device import Device
from engine.loop import fit
from engine.resume import is_finished
from engine.shards import open_shards
from engine.task import Task
from generator.autoregressive_task import AutoregressiveTask
from generator.card import family_of, generator_card
from generator.config import AutoregressiveConfig, DiffusionConfig
from generator.diffusion_task import DiffusionTask
from tokenizer.model import load_tokenizer


def train_generator(
    *,
    run: RunConfig,
    data: DataConfig,
    config: AutoregressiveConfig | DiffusionConfig,
    family: str,
    device: Device,
) -> Path:
    """Train one family on `run.folder/codes`, or resume it; returns its folder, which ends with model.json.

    Raises:
        ValueError: the tokenizer or the codes are missing or do not belong together, or the folder was begun otherwise.
    """
    if family != family_of(config):
        raise ValueError(f"family={family!r} does not fit the section {type(config).__name__}")
    tokenizer = load_tokenizer(run.folder)
    shards, test_shards = (
        open_shards(run.folder / "codes" / split, fingerprint=tokenizer.code_fingerprint) for split in ("train", "test")
    )
    folder = run.folder / family
    identity = {"seed": run.seed, family: to_dict(config), "codes": shards.identity()}
    if is_finished(folder, identity):
        return folder
    torch.manual_seed(mix(run.seed, 4))
    task: Task
    if isinstance(config, AutoregressiveConfig):
        task = AutoregressiveTask(config=config, shards=shards, test_shards=test_shards, tokenizer=tokenizer)
    else:
        task = DiffusionTask(config=config, shards=shards, test_shards=test_shards, tokenizer=tokenizer)
    weights = fit(
        task,
        Batches(shards, batch_size=config.train.batch_size, seed=run.seed, workers=data.workers),
        train=config.train,
        run=run,
        device=device,
        folder=folder,
        identity=identity,
    )
    if device.is_main:
        save_model(folder, weights["network"], {**generator_card(config, shards, tokenizer), "identity": identity})
    device.barrier()
    return folder
