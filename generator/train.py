"""Train a generator on the codes or latents of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.batches import Batches, mix
from engine.checkpoint import save_model
from engine.config import DataConfig, RunConfig, to_dict
from engine.device import Device
from engine.images import ImageSet
from engine.loop import fit
from engine.resume import is_finished
from engine.shards import Shards
from engine.sources import open_images
from engine.task import Task
from generator.autoregressive_task import AutoregressiveTask
from generator.card import family_of, generator_card
from generator.condition_config import ConditionConfig
from generator.config import AutoregressiveConfig, DiffusionConfig
from generator.consistency_task import ConsistencyTask
from generator.diffusion import check_outside
from generator.diffusion_task import DiffusionTask
from generator.learned_task import LearnedScheduleTask
from generator.order import fold_order
from generator.snapshots import load_outside
from tokenizer.encode import caption_facts, check_size, open_codes
from tokenizer.model import Tokenizer, load_tokenizer


def train_generator(
    *,
    run: RunConfig,
    data: DataConfig,
    config: AutoregressiveConfig | DiffusionConfig,
    family: str,
    device: Device,
) -> Path:
    """Train one family of the run, or resume it; returns its folder, which ends with model.json.

    It learns from `run.tokenizer_folder/codes`. With codes=on_the_fly it learns from the images, and of the codes on
    disk only the test split is needed.

    Raises:
        ValueError: the tokenizer or the codes are missing or do not belong together, the folder was begun otherwise, or
            the model that sample.outside names cannot serve beside this one.
    """
    if family != family_of(config):
        raise ValueError(f"family={family!r} does not fit the section {type(config).__name__}")
    if isinstance(config, DiffusionConfig) and config.schedule.kind == "learned" and device.parallel == "fsdp":
        raise ValueError("diffusion.schedule.kind=learned needs its weights before the network: use run.parallel=ddp")
    tokenizer = load_tokenizer(run.tokenizer_folder)
    source, content = open_source(config, tokenizer, run=run, data=data)
    test_shards = open_codes(run, "test", tokenizer)
    folder = run.folder / family
    identity = {"seed": run.seed, family: _shaping(config), "codes": content}
    defaults = {family: _shaping(type(config)())}
    if is_finished(folder, identity, defaults):
        return folder
    card = generator_card(config, source, tokenizer)
    if isinstance(config, DiffusionConfig) and config.sample.outside is not None:
        check_outside(card, load_outside(config.sample.outside), config.sample)
    torch.manual_seed(mix(run.seed, 4))
    weights = fit(
        build_task(config, source, card, test_shards=test_shards, tokenizer=tokenizer),
        Batches(source, batch_size=config.train.batch_size, seed=run.seed, workers=data.workers),
        train=config.train,
        run=run,
        device=device,
        folder=folder,
        identity=identity,
        defaults=defaults,
    )
    if device.is_main:
        network = fold_order(weights["network"])  # which changes only what was trained in random orders
        save_model(folder, network, {**card, "identity": identity})
    device.barrier()
    return folder


def _shaping(config: AutoregressiveConfig | DiffusionConfig) -> dict[str, Any]:
    """A section without what begins once the network is trained."""
    return {key: value for key, value in to_dict(config).items() if key != "align"}


def reads_codes(config: AutoregressiveConfig | DiffusionConfig) -> bool:
    """Whether this family learns from encoded training images on disk."""
    return isinstance(config, DiffusionConfig) or config.codes == "cached"


def open_source(
    config: AutoregressiveConfig | DiffusionConfig, tokenizer: Tokenizer, *, run: RunConfig, data: DataConfig
) -> tuple[Shards | ImageSet, dict[str, Any]]:
    """What a family learns from, codes and latents on disk or images to encode, and its identity, JSON-ready.

    Raises:
        ValueError: codes are missing or of another tokenizer, images are missing or of another size than its own.
    """
    if reads_codes(config):
        shards = open_codes(run, "train", tokenizer)
        return shards, _read_of(shards.identity(), config.condition)
    check_size(tokenizer, data, run.tokenizer_folder)
    images = open_images(data, "train")
    augmentation = {"crop": data.crop, "flip": data.flip}
    origin = {"tokenizer_fingerprint": tokenizer.code_fingerprint, "images": images.content()}
    facts = {**origin, "augmentation": augmentation, **caption_facts(images)}
    return images, _read_of(facts, config.condition)


def _read_of(identity: dict[str, Any], condition: ConditionConfig) -> dict[str, Any]:
    """What identifies codes without what only generators of other conditions read of them."""
    texts = condition.kind == "text" and condition.text.captions == "data"
    unread = {"low_resolution": condition.kind != "image", "captions": not texts}
    return {key: value for key, value in identity.items() if not unread.get(key)}


def build_task(
    config: AutoregressiveConfig | DiffusionConfig,
    source: Shards | ImageSet,
    card: dict[str, Any],
    *,
    test_shards: Shards,
    tokenizer: Tokenizer,
) -> Task:
    """The training of one family, with fresh weights."""
    if isinstance(config, AutoregressiveConfig):
        return AutoregressiveTask(config=config, card=card, source=source, test_shards=test_shards, tokenizer=tokenizer)
    assert isinstance(source, Shards), "diffusion learns from latents on disk"
    kind = ConsistencyTask if config.objective.kind == "consistency" else DiffusionTask
    if config.schedule.kind == "learned":
        kind = LearnedScheduleTask
    return kind(config=config, shards=source, test_shards=test_shards, tokenizer=tokenizer)
