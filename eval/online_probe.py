"""The linear probe of ImageNet scale: heads trained by SGD on frozen features of augmented images (MAE, arXiv
2111.06377, appendix A; MoCo v3, arXiv 2104.02057).

One pass of the frozen model serves many heads, one for every tap and learning rate, whose losses are summed (DINOv2,
arXiv 2304.07193, appendix): no head touches another. Features are normalised by batch statistics without weights, so
that one learning rate fits all taps.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.batches import Batches, StepRandom
from engine.config import RunConfig, TrainConfig, to_dict
from engine.device import Device
from engine.images import ImageSet, to_float, to_uint8
from engine.loop import Task, fit
from eval.config import OnlineProbeConfig
from eval.probe import Labelled, TapScore, at_open_end, count_classes, tap_score, top_hits
from eval.taps import Representation

BASE_BATCH = 256  # for which learning rates are stated
SEED = 0
ASPECT = 4 / 3  # widest and narrowest rectangle of an image
CHECKPOINTS = 10  # in a whole training
VERSION = 2  # raised whenever the same settings give other heads


class BatchNorm(nn.Module):
    """Batch norm of features without weights, over the parts of a batch on all processes; running means in eval mode.

    The first steps are averaged evenly, so that after a short training no trace of the initial values is left. Features
    are frozen, so that no gradient passes the processes.
    """

    def __init__(self, width: int, reduce: Callable[[Tensor], Tensor], *, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.reduce, self.epsilon, self.momentum = reduce, epsilon, 0.1
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] -> alike."""
        mean, variance = self.mean, self.variance
        if self.training:
            mean = self.reduce(x.mean(0))
            variance = self.reduce((x - mean).square().mean(0))
            self.steps += 1
            share = self.steps.reciprocal().clamp(min=self.momentum)
            self.mean.lerp_(mean, share)
            self.variance.lerp_(variance, share)
        return (x - mean) * (variance + self.epsilon).rsqrt()


class Heads(nn.Module):
    """Linear classifiers on the features of each tap, one for every learning rate.

    Args:
        widths: how many features each tap has.
        rates: the learning rates.
        reduce: the mean of a tensor over all processes.
    """

    def __init__(
        self,
        taps: Sequence[str],
        widths: Sequence[int],
        *,
        num_classes: int,
        rates: Sequence[float],
        reduce: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> None:
        super().__init__()
        self.taps, self.rates, self.num_classes = tuple(taps), tuple(rates), num_classes
        self.norms = nn.ModuleList(BatchNorm(width, reduce) for width in widths)
        self.linear = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, num_classes) for _ in self.rates) for width in widths
        )
        for weight in self.parameters():
            if weight.ndim > 1:
                nn.init.trunc_normal_(weight, std=0.01)
            else:
                nn.init.zeros_(weight)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Features [B, D] under each tap -> logits [taps, rates, B, K]."""
        return torch.stack([torch.stack(list(self.each(tap, features[tap]))) for tap in self.taps])

    def each(self, tap: str, features: Tensor) -> Iterator[Tensor]:
        """Logits [B, K] of features [B, D] of one tap, for each learning rate in turn."""
        place = self.taps.index(tap)
        x, heads = self.norms[place](features.float()), self.linear[place]
        assert isinstance(heads, nn.ModuleList)
        return (head(x) for head in heads)

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of an optimizer: the weights, then the biases, of each learning rate."""
        found = []
        for place, rate in enumerate(self.rates):
            heads = [heads[place] for heads in self.linear]  # type: ignore[index]
            for kind in ("weight", "bias"):
                found.append({"params": [getattr(head, kind) for head in heads], "peak_lr": rate, "kind": kind})
        return found


class ProbeTask(Task):
    """Cross-entropy of all heads on one batch of augmented images."""

    auxiliary = ("heads",)

    def __init__(self, config: OnlineProbeConfig, representation: Representation, heads: Heads) -> None:
        self.config, self.representation = config, representation
        self.modules = {"heads": heads}
        self.optimizers = {"heads": optimizer(config, heads)}

    def step(self, batch: dict[str, Tensor], rng: StepRandom) -> dict[str, Tensor]:
        labels = batch["labels"]
        with torch.no_grad():
            images = augmented(batch["images"], rng.uniform(5), min_scale=self.config.min_scale, flip=self.config.flip)
            features = self.representation.outputs(images)
        with torch.autocast(labels.device.type, enabled=False):
            logits = self.modules["heads"](features).flatten(0, 1)  # [heads, B, K]
            loss = len(logits) * F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))  # their sum
        hits = (logits.argmax(2) == labels).float().mean(1)  # [heads]
        return {"loss": loss, "best_accuracy": hits.max()}


def optimizer(config: OnlineProbeConfig, heads: Heads) -> torch.optim.Optimizer:
    """SGD with momentum, or LARS, which adapts the step to the norms of weights, but not of biases."""
    groups: list[dict[str, Any]] = []
    for group in heads.groups():
        rate = group["peak_lr"] * config.batch_size / BASE_BATCH
        adapted = {"always_adapt": group["kind"] == "weight"} if config.optimizer == "lars" else {}
        groups.append({"params": group["params"], "lr": rate, "peak_lr": rate, **adapted})
    if config.optimizer == "lars":
        from timm.optim import Lars

        return Lars(groups, momentum=0.9)
    return torch.optim.SGD(groups, momentum=0.9)


def augmented(images: Tensor, draws: Tensor, *, min_scale: float, flip: bool) -> Tensor:
    """A random rectangle of each image, resized to the whole by a bicubic filter, half of them mirrored.

    Since a rectangle is never larger than the image, there is nothing to antialias. Sides that would be longer than the
    image's are cut to it.

    Args:
        images: uint8 [B, 3, H, W].
        draws: uniform numbers in [0, 1), float [B, 5]: mirror, area, shape, top, left.
        min_scale: smallest area, as a share of the image's; 1 leaves the image whole.
    """
    mirror, area, shape, top, left = draws.unbind(1)  # [B] each
    share = min_scale + (1 - min_scale) * area
    aspect = ASPECT ** (2 * shape - 1) if min_scale < 1 else torch.ones_like(shape)
    height, width = (share / aspect).sqrt().clamp(max=1), (share * aspect).sqrt().clamp(max=1)
    turned = torch.where(mirror < 0.5, -1.0, 1.0) if flip else torch.ones_like(mirror)
    zero = torch.zeros_like(width)
    # From the place in the new image, -1 .. 1, to the place in the old one.
    across = torch.stack([width * turned, zero, (1 - width) * (2 * left - 1)], dim=1)
    down = torch.stack([zero, height, (1 - height) * (2 * top - 1)], dim=1)
    grid = F.affine_grid(torch.stack([across, down], dim=1), list(images.shape), align_corners=False)
    x = F.grid_sample(to_float(images), grid, mode="bicubic", padding_mode="border", align_corners=False)
    return to_uint8(x)


class Rows:
    """The images of a set at some indices, as training reads them."""

    def __init__(self, images: ImageSet, rows: np.ndarray) -> None:
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, Tensor]:
        """Images uint8 [B, 3, S, S], whole whatever the draws, and labels int64 [B]."""
        return self.images.load(self.rows[indices])


def train_heads(
    config: OnlineProbeConfig,
    representation: Representation,
    *,
    images: ImageSet,
    rows: np.ndarray,
    run: RunConfig,
    device: Device,
) -> Heads:
    """Heads for all taps of a model, trained on the images at `rows`, in eval mode on the device.

    What they learnt lies in run.folder/eval/probe/<subject>; the same command continues an interrupted training. Every
    process of a run must call it.

    Raises:
        ValueError: labels of fewer than two classes, or a batch that the processes cannot share evenly.
    """
    num_classes = count_classes(torch.from_numpy(images.labels[rows]))
    with torch.no_grad():
        shown = representation.outputs(images.load(rows[:2])["images"].to(device.device))
    widths = [shown[tap].shape[1] for tap in representation.taps]

    def fresh() -> Heads:
        torch.manual_seed(SEED)
        return Heads(
            representation.taps, widths, num_classes=num_classes, rates=config.learning_rates, reduce=device.mean
        )

    identity = {
        "version": VERSION, "online": to_dict(config), "representation": representation.identity(),
        "data": images.content(), "rows": hashlib.sha256(rows.astype(np.int64).tobytes()).hexdigest()[:16],
        "num_classes": num_classes,
    }  # fmt: skip
    weights = fit(
        ProbeTask(config, representation, fresh()),
        Batches(Rows(images, rows), batch_size=config.batch_size, seed=SEED, workers=2),
        train=_schedule(config, len(rows)),
        run=replace(run, seed=SEED, tensorboard=False),
        device=device,
        folder=_own_folder(run.folder / "eval" / "probe" / representation.subject, identity, device),
        identity=identity,
    )
    heads = fresh()
    heads.load_state_dict(weights["heads"])
    return heads.eval().requires_grad_(False).to(device.device)


def score_heads(heads: Heads, tap: str, *, held_out: Labelled, test: Labelled) -> TapScore:
    """The head of a tap that does best on held-out images, scored on test images."""
    answers = heads.each(tap, held_out.features)
    accuracies = [top_hits(logits, held_out.labels) / len(held_out.labels) for logits in answers]
    best = accuracies.index(max(accuracies))
    [logits] = islice(heads.each(tap, test.features), best, best + 1)
    rising = [accuracies[place] for place in np.argsort(heads.rates)]
    return tap_score(
        tap, logits, test.labels, setting=heads.rates[best], held_out=accuracies[best], at_end=at_open_end(rising),
    )  # fmt: skip


def _schedule(config: OnlineProbeConfig, num_images: int) -> TrainConfig:
    """Steps and learning rate of so many passes over the images; each head has a peak rate of its own."""
    per_epoch = num_images / config.batch_size
    steps = max(1, round(config.epochs * per_epoch))
    return TrainConfig(
        steps=steps,
        batch_size=config.batch_size,
        learning_rate=1.0,
        warmup_steps=min(steps - 1, round(config.warmup_epochs * per_epoch)),
        clip_norm=0,
        ema=0,
        log_every=max(1, round(per_epoch)),
        preview_every=0,
        checkpoint_every=-(-steps // CHECKPOINTS),
        keep_last=1,
    )


def _own_folder(folder: Path, identity: dict[str, Any], device: Device) -> Path:
    """The folder, emptied if it holds heads of other settings, weights or images."""
    told = folder / "identity.json"
    if device.is_main and told.exists():
        stored = json.loads(told.read_text())
        if {key: stored.get(key) for key in identity} != json.loads(json.dumps(identity)):
            shutil.rmtree(folder)
    device.barrier()
    return folder
