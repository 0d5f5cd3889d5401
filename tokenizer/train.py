"""Trains the tokenizer: reconstruct the images, keep the codebook in use, hold an opponent off, measure the latents."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.batches import Batches, StepRandom, mix, part_rows
from engine.checkpoint import newest_whole, save_model
from engine.config import DataConfig, RunConfig, difference, to_dict
from engine.device import Device
from engine.images import ImageSet, to_float, to_uint8
from engine.loop import fit
from engine.optim import build_optimizer
from engine.resume import check_identity, is_finished
from engine.sources import open_images
from engine.task import Task
from tokenizer.adversary import Adversary
from tokenizer.config import TokenizerConfig
from tokenizer.costs import untrained
from tokenizer.discriminator import build_discriminator, group_size
from tokenizer.guard import Guard
from tokenizer.losses import adaptive_weight, l1, l2, logit_laplace, psnr
from tokenizer.model import Tokenizer, code_fingerprint, code_settings, load_tokenizer, model_card, to_pixels
from tokenizer.perceptual import open_perceptual
from tokenizer.quantize import Codebook
from tokenizer.revival import VECTORS_PER_CODE, kmeans, revive
from tokenizer.usage import Usage

USAGE_IMAGES = 256  # code usage is counted over so many images, as in ViT-VQGAN
VALIDATION_IMAGES = 1024
PREVIEW_IMAGES = 32
LATENT_IMAGES = 10_000
# Settings that change nothing of what is learnt.
ENCODING = ("latent_statistics", "views", "low_resolution", "encode_batch_size")


class TokenizerTask(Task):
    """Reconstruction through a bottleneck, with whatever losses have a weight."""

    averaged = ("tokenizer",)
    auxiliary = ("discriminator",)

    def __init__(self, tokenizer: Tokenizer, config: TokenizerConfig, *, test: ImageSet, device: Device) -> None:
        self.config, self.test, self.device, self.tokenizer = config, test, device, tokenizer
        self.modules: dict[str, nn.Module] = {"tokenizer": tokenizer}
        self.optimizers: dict[str, torch.optim.Optimizer] = {"tokenizer": build_optimizer(tokenizer, config.train)}
        self.codebook = tokenizer.quantizer if isinstance(tokenizer.quantizer, Codebook) else None
        if config.encoder_from is not None:
            self.codebook = None  # it is frozen
        self.num_codes = tokenizer.vocab_size * tokenizer.quantizer.codes_per_token  # in all codebooks together
        self.usage = Usage(self.num_codes, codes_per_step=config.train.batch_size * tokenizer.length)
        reachable = USAGE_IMAGES * tokenizer.length / max(1, self.num_codes)
        self.guard = Guard(kind=config.quantizer.kind, reachable=reachable)
        self.perceptual: nn.Module | None = None
        self.adversary: Adversary | None = None
        if config.loss.perceptual:
            spec, size = config.loss.perceptual_network, tokenizer.image_size
            self.perceptual = open_perceptual(spec, image_size=size).to(device.device)
        if config.loss.adversarial:
            self._add_discriminator()
        self.before_step()

    def _add_discriminator(self) -> None:
        settings = self.config.discriminator
        if settings.adaptive and self.device.parallel == "fsdp":
            raise ValueError("discriminator.adaptive=true needs the whole last layer: use run.parallel=ddp")
        share = part_rows(self.config.train.batch_size, 0, self.device.world * self.config.train.accumulate).stop
        if settings.kind == "stylegan2" and group_size(share, 1) == 1:
            told = f"discriminator.kind=stylegan2: {share} images at a time make no groups of 2 to 4"
            warnings.warn(f"{told} for its minibatch deviation; choose an even share of train.batch_size", stacklevel=2)
        network = build_discriminator(settings, self.tokenizer.image_size).to(self.device.device)
        peak = settings.learning_rate or self.config.train.learning_rate
        self.modules["discriminator"] = network
        training = replace(self.config.train, learning_rate=peak, betas=settings.betas, weight_decay=0.0)
        self.optimizers["discriminator"] = build_optimizer(network, training)
        self.adversary = Adversary(network, settings)

    def before_step(self) -> None:
        """Forget the codes of a step that was skipped."""
        self.counts = torch.zeros(self.num_codes, device=self.device.device)
        self.vectors: list[Tensor] = []
        self.codes: list[Tensor] = []

    def step(self, batch: dict[str, Tensor], rng: StepRandom) -> dict[str, Tensor]:
        target = to_float(batch["images"])  # [B, 3, H, W]
        output, codes, losses, stats = self.modules["tokenizer"](target)
        images = to_pixels(output)  # [B, 3, H, W]
        losses |= self._pixel_losses(output, images, target)
        loss = self._weighted(losses)
        if self.adversary is not None and self.adversary.begun:
            losses |= self._play(loss, images, target, rng.step)
            loss = loss + losses.pop("weighted_adversarial") + losses["discriminator"]
        if codes is not None:
            self._keep(codes, stats)
        quality = psnr(to_uint8(images.detach().float()), batch["images"]).mean()
        return {"loss": loss, **losses, "psnr": quality}

    def _pixel_losses(self, output: Tensor, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        losses = {"l2": l2(images, target), "l1": l1(images, target)}
        if self.config.loss.logit_laplace:
            losses["logit_laplace"] = logit_laplace(output, target)
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(images, target).mean()
        return losses

    def _weighted(self, losses: dict[str, Tensor]) -> Tensor:
        return torch.stack([getattr(self.config.loss, name) * value for name, value in losses.items()]).sum()

    def _play(self, reconstruction: Tensor, images: Tensor, target: Tensor, step: int) -> dict[str, Tensor]:
        """Both sides of the adversarial game in one step, from the same reconstructions."""
        assert self.adversary is not None
        adversarial = self.adversary.generator_loss(images)
        told = {"adversarial": adversarial, "weighted_adversarial": self.config.loss.adversarial * adversarial}
        if self.config.discriminator.adaptive:
            layer = self.tokenizer.decoder.last_layer
            assert isinstance(layer, Tensor)
            gradients = [self._shared_gradient(value, layer) for value in (reconstruction, adversarial)]
            told["adaptive_weight"] = adaptive_weight(*gradients)
            told["weighted_adversarial"] = told["adaptive_weight"] * told["weighted_adversarial"]
        return told | self.adversary.discriminator_losses(self.modules["discriminator"], target, images, step)

    def _shared_gradient(self, value: Tensor, parameter: Tensor) -> Tensor:
        """The gradient of `value` over all processes."""
        return self.device.mean(torch.autograd.grad(value, parameter, retain_graph=True)[0])

    def _keep(self, codes: Tensor, stats: dict[str, Tensor]) -> None:
        """What after_step needs, over all parts of the batch."""
        ones, distinct = torch.ones(codes.numel(), device=codes.device), self.tokenizer.quantizer.distinct(codes)
        self.counts.index_add_(0, distinct.flatten(), ones)  # bincount would wait for the device
        if self.codebook is not None:
            self.vectors.append(stats["vectors"].flatten(0, 1))  # [N, D]
            self.codes.append(codes.flatten())  # [N]

    def after_step(self, step: int, metrics: dict[str, float], rng: StepRandom) -> None:
        """Count the codes of all processes, move and revive codes, add figures to the metrics, warn if they are bad."""
        if self.num_codes:
            counts = self.device.sum(self.counts)
            self.usage.update(counts)
            metrics |= {
                "perplexity": self.usage.perplexity(),
                "dead_codes": float(self.usage.dead()),
                "usage": self.usage.share(-(-USAGE_IMAGES // self.config.train.batch_size)),
            }
            if self.codebook is not None:
                self._move_codes(self.codebook, counts)
                metrics["revived"] = self._revive(self.codebook, rng)
        if self.adversary is not None:
            metrics["adversary"] = float(self.adversary.begun)
            self.adversary.after_step(step, metrics)
        if self.device.is_main:
            self.guard.after_step(step, metrics)

    def _move_codes(self, codebook: Codebook, counts: Tensor) -> None:
        """Let codes that follow a moving average follow it."""
        if self.config.quantizer.update == "ema":
            vectors, codes = torch.cat(self.vectors), torch.cat(self.codes)  # [N, D], [N]
            sums = vectors.new_zeros(self.num_codes, vectors.shape[1]).index_add_(0, codes, vectors)
            codebook.ema_update(counts, self.device.sum(sums))

    def _revive(self, codebook: Codebook, rng: StepRandom) -> int:
        """Replace the codes that are due, and return how many."""
        patience = self.config.quantizer.revive_after
        if not patience:
            return 0
        dead = self.usage.expired(patience)
        if dead.any():
            vectors, optimizer = torch.cat(self.vectors), self.optimizers["tokenizer"]  # [N, D]
            revive(codebook, dead, vectors, optimizer, device=self.device, generator=rng.generator)
        return int(dead.sum())

    def validate(self) -> dict[str, float]:
        """PSNR in dB per image, and the share of codes used, over the first test images."""
        qualities, used = [], torch.zeros(self.num_codes, dtype=torch.bool)
        stop = min(len(self.test), VALIDATION_IMAGES)
        for batch in self.test.in_order(self.config.encode_batch_size, stop=stop):
            images, codes = self._reconstruct(batch["images"])
            qualities.append(psnr(images, batch["images"]))
            if codes is not None:
                used[self.tokenizer.quantizer.distinct(codes).flatten()] = True
        figures = {"psnr": torch.cat(qualities).mean().item()}
        return figures | ({"usage": used.double().mean().item()} if self.num_codes else {})

    def preview(self) -> dict[str, Tensor]:
        """Test images, each followed by its reconstruction."""
        batch = next(self.test.in_order(PREVIEW_IMAGES, stop=PREVIEW_IMAGES))
        pairs = torch.stack([batch["images"], self._reconstruct(batch["images"])[0]], dim=1)  # [N, 2, 3, H, W]
        return {"reconstructions": pairs.flatten(0, 1)}

    def state_dict(self) -> dict[str, Any]:
        state = {"usage": self.usage.state_dict(), "guard": dict(self.guard.streaks)}
        return state if self.adversary is None else {**state, "adversary": self.adversary.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.usage.load_state_dict(state["usage"])
        self.guard.streaks = state["guard"]
        if self.adversary is not None:
            self.adversary.load_state_dict(state["adversary"])

    def _reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 images -> uint8 reconstructions and codes, on the CPU; through the network as the loop holds it."""
        output, codes, _, _ = self.modules["tokenizer"](to_float(images.to(self.device.device)))
        return to_uint8(to_pixels(output.float())).cpu(), None if codes is None else codes.cpu()


def train_tokenizer(*, run: RunConfig, data: DataConfig, tokenizer: TokenizerConfig, device: Device) -> Path:
    """Train the tokenizer of a run, or resume it, and write `<run>/tokenizer/model.*`; returns that folder.

    With `encoder_from` only the decoder is trained, and codes and latents stay those of the tokenizer named there.
    Pixels have nothing to train: their statistics are measured at once. Where only `latent_statistics` has changed
    since the run was finished, the latents are measured anew and the networks stay.

    Raises:
        ValueError: the sizes do not fit each other, or the folder holds another run.
    """
    folder, images = run.folder / "tokenizer", open_images(data, "train")
    source = None if tokenizer.encoder_from is None else load_source(tokenizer.encoder_from)
    identity, defaults = run_identity(run, data, tokenizer, images, source), default_identity(tokenizer)
    whole = {**identity, "latent_statistics": tokenizer.latent_statistics}
    if is_finished(folder, whole, {**defaults, "latent_statistics": "per_channel"}):
        return folder
    if tokenizer.model.learned:
        weights = learn(tokenizer, run, data, images, source, identity=identity, defaults=defaults, device=device)
    else:
        weights = begin_pixels(folder, identity, len(images), device)
    trained = Tokenizer(tokenizer.model, tokenizer.quantizer, image_size=data.size)
    trained.load_state_dict({**trained.state_dict(), **weights})
    trained.to(device.device).eval()
    if source is None:
        kind, size = tokenizer.latent_statistics, tokenizer.encode_batch_size
        measure_latents(trained, images, kind=kind, device=device, batch_size=size)
    elif code_fingerprint(trained) != source.code_fingerprint:
        raise RuntimeError(f"{folder}: the frozen encoder has changed in training; this is a fault of ours, report it")
    if device.is_main:
        facts = {"identity": whole, "class_names": list(images.class_names), "finished": time.strftime("%Y-%m-%d")}
        save_model(folder, trained.cpu().state_dict(), {**model_card(trained), **facts})
    device.barrier()
    return folder


def learn(
    tokenizer: TokenizerConfig,
    run: RunConfig,
    data: DataConfig,
    images: ImageSet,
    source: Tokenizer | None,
    *,
    identity: dict[str, Any],
    defaults: dict[str, Any],
    device: Device,
) -> dict[str, Tensor]:
    """The weights after training, averaged where the configuration says so; `source` is what `encoder_from` names."""
    torch.manual_seed(run.seed)
    model, folder = untrained(tokenizer, data.size), run.folder / "tokenizer"
    if source is not None:
        take_over(model, source)
    model.to(device.device)
    batches = Batches(images, batch_size=tokenizer.train.batch_size, seed=run.seed, workers=data.workers)
    task = TokenizerTask(model, tokenizer, test=open_images(data, "test"), device=device)
    begins = newest_whole(folder / "checkpoints") is None
    if task.codebook is not None and tokenizer.quantizer.kmeans_start and begins:
        start_codebook(model, batches, seed=run.seed, device=device)
    known = {"identity": identity, "defaults": defaults}
    return fit(task, batches, train=tokenizer.train, run=run, device=device, folder=folder, **known)["tokenizer"]


def begin_pixels(folder: Path, identity: dict[str, Any], num_images: int, device: Device) -> dict[str, Tensor]:
    """The weights of pixels, which are none; says so, and refuses a folder that another tokenizer was begun in."""
    if device.is_main:
        check_identity(folder, identity)
        measured = min(num_images, LATENT_IMAGES)
        print(f"{folder}: pixels have nothing to train; measuring mean and deviation over {measured:,} images")
    device.barrier()
    return {}


def load_source(path: str) -> Tokenizer:
    """The trained tokenizer that `encoder_from` names.

    Raises:
        ValueError: there is none.
    """
    try:
        return load_tokenizer(path)
    except ValueError as error:
        raise ValueError(f"tokenizer.encoder_from={path}: {error}") from error


def take_over(model: Tokenizer, source: Tokenizer) -> None:
    """Copy the encoder and bottleneck of `source`, and its decoder as a start if the sizes agree.

    Raises:
        ValueError: settings of the encoder or of the bottleneck differ.
    """
    changes = difference(code_settings(source), code_settings(model))
    if changes:
        told = ", ".join(f"{key} {before!r} -> {after!r}" for key, (before, after) in changes.items())
        raise ValueError(
            f"tokenizer.encoder_from: encoder and bottleneck must be those of the run that it names, but {told}; only "
            "the decoder may change"
        )
    kept = {name: value for name, value in source.state_dict().items() if not name.startswith("decoder.")}
    model.load_state_dict({**model.state_dict(), **kept})
    decoder = source.decoder.state_dict()
    if {name: value.shape for name, value in decoder.items()} == {
        name: value.shape for name, value in model.decoder.state_dict().items()
    }:
        model.decoder.load_state_dict(decoder)


def run_identity(
    run: RunConfig, data: DataConfig, tokenizer: TokenizerConfig, images: ImageSet, source: Tokenizer | None = None
) -> dict[str, Any]:
    """All that decides what is learnt, JSON-ready; of pixels, which pixels."""
    if not tokenizer.model.learned:
        return {"data": images.content(), "tokenizer": {"model": {"architecture": tokenizer.model.architecture}}}
    settings = {**learning_settings(tokenizer), "encoder_from": source and source.fingerprint}
    augmentation = {"crop": data.crop, "flip": data.flip}
    return {"seed": run.seed, "data": {**images.content(), "augmentation": augmentation}, "tokenizer": settings}


def default_identity(tokenizer: TokenizerConfig) -> dict[str, Any]:
    """What a setting counts as that was not there yet when a run was begun."""
    return {"tokenizer": learning_settings(TokenizerConfig())} if tokenizer.model.learned else {}


def learning_settings(tokenizer: TokenizerConfig) -> dict[str, Any]:
    """The settings that training reads, JSON-ready."""
    return {key: value for key, value in to_dict(tokenizer).items() if key not in ENCODING}


@torch.no_grad()
def start_codebook(model: Tokenizer, batches: Batches, *, seed: int, device: Device) -> None:
    """Set the codes to k-means centroids of the untrained encoder's vectors, found by the first process for all."""
    quantizer = model.quantizer
    assert isinstance(quantizer, Codebook)
    centroids = torch.zeros_like(quantizer.codebook)
    if device.is_main:
        wanted = model.vocab_size * VECTORS_PER_CODE
        per_batch = batches.batch_size * model.grid[0] * model.grid[1]
        found = []
        for step in range(-(-wanted // per_batch)):
            found.append(model.vectors(batches.batch(step)["images"].to(device.device)).flatten(0, 1))  # [N, D]
        generator = torch.Generator().manual_seed(mix(seed, 0, 0, 5))
        centroids = kmeans(
            torch.cat(found), model.vocab_size, generator=generator, spherical=model.bottleneck.normalize
        )
    quantizer.codebook.copy_(device.sum(centroids))
    quantizer.restart_averages()


@torch.no_grad()
def measure_latents(
    tokenizer: Tokenizer,
    images: ImageSet,
    *,
    kind: str = "per_channel",
    device: Device,
    batch_size: int,
    limit: int = LATENT_IMAGES,
) -> None:
    """Set the tokenizer's latent mean and standard deviation from up to `limit` images, shared among the processes.

    The images are spread evenly over the set, which may be sorted by class. Sums are streamed, in float64.
    """
    total = min(len(images), limit)
    start, stop = (total * rank // device.world for rank in (device.rank, device.rank + 1))
    chosen = np.arange(start, stop) * len(images) // total
    sums = torch.zeros(3, tokenizer.latent_shape[0], dtype=torch.float64)  # count, sum, sum of squares per channel
    for first in range(0, len(chosen), batch_size):
        batch = images.load(chosen[first : first + batch_size])["images"].to(device.device)
        vectors = tokenizer.vectors(batch).flatten(0, 1).double().cpu()  # [N, C]
        sums += torch.stack([torch.full_like(vectors[0], len(vectors)), vectors.sum(0), vectors.square().sum(0)])
    mean, std = shift_and_scale(kind, *device.sum(sums.to(device.device)).cpu())
    tokenizer.latent_mean.copy_(mean)
    tokenizer.latent_std.copy_(std)


def shift_and_scale(kind: str, count: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """What is subtracted from each channel of the latents, and what they are then divided by, float64 [C] each.

    Of `count` numbers per channel with the sum `first` and the sum of squares `second`, [C] each. `per_channel` leaves
    zero mean and unit variance; `static` divides all by the root of their mean square. Latent diffusion (arXiv
    2112.10752) has one factor too, the deviation from the common mean.
    """
    mean, mean_square = first / count, second / count
    if kind == "static":
        return torch.zeros_like(mean), mean_square.mean().clamp(min=1e-12).sqrt().expand_as(mean)
    return mean, (mean_square - mean.square()).clamp(min=1e-12).sqrt()
