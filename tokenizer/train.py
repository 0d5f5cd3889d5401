"""Trains the tokenizer: reconstruct the images, keep the codebook in use, then measure the latents."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.batches import Batches, StepRandom, mix
from engine.checkpoint import newest_whole, save_model
from engine.config import DataConfig, RunConfig, to_dict
from engine.device import Device
from engine.images import ImageSet, to_float, to_uint8
from engine.loop import fit
from engine.optim import adamw
from engine.resume import is_finished
from engine.sources import open_images
from engine.task import Task
from tokenizer.config import TokenizerConfig
from tokenizer.losses import l1, l2, psnr
from tokenizer.model import Tokenizer, model_card
from tokenizer.revival import VECTORS_PER_CODE, Usage, perplexity, revive, spherical_kmeans

USAGE_IMAGES = 256  # code usage is counted over so many images, as in ViT-VQGAN
VALIDATION_IMAGES = 1024
PREVIEW_IMAGES = 32
LATENT_IMAGES = 10_000


class TokenizerTask(Task):
    """Reconstruction with a vector-quantised bottleneck."""

    averaged = ("tokenizer",)

    def __init__(self, tokenizer: Tokenizer, config: TokenizerConfig, *, test: ImageSet, device: Device) -> None:
        self.config, self.test, self.device = config, test, device
        self.modules = {"tokenizer": tokenizer}
        self.optimizers = {"tokenizer": adamw(tokenizer, config.train)}
        self.quantizer, self.vocab_size = tokenizer.quantizer, tokenizer.vocab_size
        self.usage = Usage(self.vocab_size)
        self.before_step()

    def before_step(self) -> None:
        """Forget the codes of a step that was skipped."""
        self.counts = torch.zeros(self.vocab_size, device=self.device.device)
        self.vectors: list[Tensor] = []

    def step(self, batch: dict[str, Tensor], rng: StepRandom) -> dict[str, Tensor]:
        target = to_float(batch["images"])  # [B, 3, H, W]
        images, codes, losses, stats = self.modules["tokenizer"](target)
        losses |= {"l2": l2(images, target), "l1": l1(images, target)}
        weights = self.config.loss
        loss = sum(getattr(weights, name) * value for name, value in losses.items())
        # What after_step needs, over all parts of the batch.
        ones = torch.ones(codes.numel(), device=codes.device)
        self.counts.index_add_(0, codes.flatten(), ones)  # bincount would wait for the device
        self.vectors.append(stats["vectors"].flatten(0, 1))  # [N, D]
        quality = psnr(to_uint8(images.detach().float()), batch["images"]).mean()
        return {"loss": loss, **losses, "psnr": quality}

    def after_step(self, step: int, metrics: dict[str, float], rng: StepRandom) -> None:
        """Count the codes of all processes, revive those long unused, add figures of the codebook to the metrics."""
        counts = self.device.sum(self.counts)
        self.usage.update(counts)
        metrics["perplexity"] = perplexity(counts)
        metrics["usage"] = self.usage.share(-(-USAGE_IMAGES // self.config.train.batch_size))
        metrics["revived"] = self._revive(rng)

    def _revive(self, rng: StepRandom) -> int:
        """Replace the codes that are due, and return how many."""
        patience = self.config.quantizer.revive_after
        if not patience:
            return 0
        dead = self.usage.expired(patience)
        if dead.any():
            codebook, optimizer = self.quantizer.codebook, self.optimizers["tokenizer"]
            vectors = torch.cat(self.vectors)  # [N, D]
            revive(codebook, dead, vectors, optimizer, device=self.device, generator=rng.generator)
        return int(dead.sum())

    def validate(self) -> dict[str, float]:
        """PSNR in dB per image, and the share of codes used, over the first test images."""
        qualities, used = [], torch.zeros(self.vocab_size, dtype=torch.bool)
        stop = min(len(self.test), VALIDATION_IMAGES)
        for batch in self.test.in_order(self.config.encode_batch_size, stop=stop):
            images, codes = self._reconstruct(batch["images"])
            qualities.append(psnr(images, batch["images"]))
            used[codes.flatten()] = True
        return {"psnr": torch.cat(qualities).mean().item(), "usage": used.double().mean().item()}

    def preview(self) -> dict[str, Tensor]:
        """Test images, each followed by its reconstruction."""
        batch = next(self.test.in_order(PREVIEW_IMAGES, stop=PREVIEW_IMAGES))
        pairs = torch.stack([batch["images"], self._reconstruct(batch["images"])[0]], dim=1)  # [N, 2, 3, H, W]
        return {"reconstructions": pairs.flatten(0, 1)}

    def state_dict(self) -> dict[str, Any]:
        return {"idle": self.usage.idle, "waited": self.usage.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.usage.idle, self.usage.waited = state["idle"], state["waited"]

    def _reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images -> uint8 reconstructions and codes, on the CPU; through the network as the loop holds it."""
        output, codes, _, _ = self.modules["tokenizer"](to_float(images.to(self.device.device)))
        return to_uint8(output.float()).cpu(), codes.cpu()


def train_tokenizer(*, run: RunConfig, data: DataConfig, tokenizer: TokenizerConfig, device: Device) -> Path:
    """Train the tokenizer of a run, or resume it, and write `<run>/tokenizer/model.*`; returns that folder.

    Raises:
        ValueError: the sizes do not fit each other, or the folder holds another run.
    """
    folder = run.folder / "tokenizer"
    images, test = open_images(data, "train"), open_images(data, "test")
    identity = run_identity(run, data, tokenizer, images)
    if is_finished(folder, identity):
        return folder
    torch.manual_seed(run.seed)
    model = Tokenizer(tokenizer.model, tokenizer.quantizer, image_size=data.size).to(device.device)
    batches = Batches(images, batch_size=tokenizer.train.batch_size, seed=run.seed, workers=data.workers)
    if tokenizer.quantizer.kmeans_start and newest_whole(folder / "checkpoints") is None:
        start_codebook(model, batches, seed=run.seed, device=device)
    task = TokenizerTask(model, tokenizer, test=test, device=device)
    weights = fit(task, batches, train=tokenizer.train, run=run, device=device, folder=folder, identity=identity)
    trained = Tokenizer(tokenizer.model, image_size=data.size)
    trained.load_state_dict(weights["tokenizer"])
    measure_latents(trained.to(device.device).eval(), images, device=device, batch_size=tokenizer.encode_batch_size)
    if device.is_main:
        facts = {"identity": identity, "class_names": list(images.class_names), "finished": time.strftime("%Y-%m-%d")}
        save_model(folder, trained.cpu().state_dict(), {**model_card(trained), **facts})
    device.barrier()
    return folder


def run_identity(run: RunConfig, data: DataConfig, tokenizer: TokenizerConfig, images: ImageSet) -> dict[str, Any]:
    """All that decides what is learnt, JSON-ready."""
    settings = to_dict(tokenizer)
    for key in ("views", "encode_batch_size"):
        del settings[key]
    augmentation = {"crop": data.crop, "flip": data.flip}
    return {"seed": run.seed, "data": {**images.content(), "augmentation": augmentation}, "tokenizer": settings}


@torch.no_grad()
def start_codebook(model: Tokenizer, batches: Batches, *, seed: int, device: Device) -> None:
    """Set the codes to k-means centroids of the untrained encoder's vectors, found by the first process for all."""
    codebook = model.quantizer.codebook
    centroids = torch.zeros_like(codebook)
    if device.is_main:
        wanted = model.vocab_size * VECTORS_PER_CODE
        per_batch = batches.batch_size * model.grid[0] * model.grid[1]
        found = []
        for step in range(-(-wanted // per_batch)):
            found.append(model.vectors(batches.batch(step)["images"].to(device.device)).flatten(0, 1))  # [N, D]
        generator = torch.Generator().manual_seed(mix(seed, 0, 0, 5))
        centroids = spherical_kmeans(torch.cat(found), model.vocab_size, generator=generator)
    codebook.copy_(device.sum(centroids))


def measure_latents(
    tokenizer: Tokenizer, images: ImageSet, *, device: Device, batch_size: int, limit: int = LATENT_IMAGES
) -> None:
    """Set the tokenizer's latent mean and standard deviation from up to `limit` images, shared among the processes."""
    total = min(len(images), limit)
    start, stop = (total * rank // device.world for rank in (device.rank, device.rank + 1))
    sums = torch.zeros(3, tokenizer.config.code_dim, dtype=torch.float64)  # count, sum, sum of squares per channel
    for batch in images.in_order(batch_size, start=start, stop=stop):
        vectors = tokenizer.vectors(batch["images"].to(device.device)).flatten(0, 1).double().cpu()  # [N, C]
        sums += torch.stack([torch.full_like(vectors[0], len(vectors)), vectors.sum(0), vectors.square().sum(0)])
    count, first, second = device.sum(sums.to(device.device)).cpu()
    mean = first / count
    variance = (second / count - mean.square()).clamp(min=1e-12)
    tokenizer.latent_mean.copy_(mean)
    tokenizer.latent_std.copy_(variance.sqrt())
