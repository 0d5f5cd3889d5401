"""A small classifier trained on the data set itself: features that need no download, and a check of asked classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.batches import Batches, StepRandom
from engine.checkpoint import load_model, save_model
from engine.config import RunConfig, to_dict
from engine.device import Device
from engine.images import ImageSet, to_float
from engine.loop import Task, fit
from engine.optim import build_optimizer
from engine.resume import is_finished
from eval.config import ClassifierConfig
from eval.statistics import Estimate, proportion

FEATURES = 64
DEFAULTS = {"classifier": to_dict(ClassifierConfig())}  # of settings that a stored classifier is too old to name


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a skip, each after GroupNorm and SiLU (no batch statistics anywhere)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.silu(norm(y)))
        return x + y


class Classifier(nn.Module):
    """Convolutional network for small images, about 0.3 M parameters at the default widths."""

    def __init__(self, widths: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        first, second, third = widths
        self.num_classes = num_classes
        self.trunk = nn.Sequential(
            nn.Conv2d(3, first, 3, stride=2, padding=1),  # [B, C1, H/2, W/2]
            nn.GroupNorm(8, first),
            nn.SiLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1),  # [B, C2, H/4, W/4]
            Residual(second),
            nn.Conv2d(second, third, 3, stride=2, padding=1),  # [B, C3, H/8, W/8]
            Residual(third),
            nn.GroupNorm(8, third),
            nn.SiLU(),
        )
        self.penultimate = nn.Linear(third, FEATURES)
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> [B, 64], the input of the last layer."""
        return F.silu(self.penultimate(self.trunk(to_float(images)).mean((2, 3))))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> logits [B, K]."""
        return self.head(self.features(images))


class ClassifierTask(Task):
    """Cross-entropy on slightly shifted images; an image whose label is unknown (-1) teaches nothing."""

    def __init__(self, config: ClassifierConfig, num_classes: int) -> None:
        torch.manual_seed(config.seed)
        network = Classifier(config.widths, num_classes)
        self.modules = {"classifier": network}
        self.optimizers = {"classifier": build_optimizer(network, config.train)}
        self.averaged = ("classifier",)
        self.shift = config.shift

    def step(self, batch: dict[str, Tensor], rng: StepRandom) -> dict[str, Tensor]:
        images, labels = batch["images"], batch["labels"]
        if self.shift:
            images = shifted(images, rng.integers(2 * self.shift + 1, 2), self.shift)
        logits = self.modules["classifier"](images)
        known = labels >= 0
        losses = F.cross_entropy(logits.float(), labels.clamp(min=0), reduction="none") * known
        hits = (logits.argmax(1) == labels).float().sum()
        return {"loss": losses.sum() / known.sum().clamp(min=1), "accuracy": hits / known.sum().clamp(min=1)}


def shifted(images: Tensor, offsets: Tensor, reach: int) -> Tensor:
    """Move uint8 images [B, 3, S, S] by offsets - reach, int64 [B, 2] in 0 .. 2 reach; the border is repeated."""
    size = images.shape[-1]
    steps = torch.arange(size, device=images.device)
    rows, columns = ((steps + offsets[:, axis, None] - reach).clamp(0, size - 1) for axis in (0, 1))  # [B, S]
    picture = torch.arange(len(images), device=images.device)[:, None, None]
    return images[picture, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def class_count(labels: np.ndarray, class_names: tuple[str, ...] = ()) -> int:
    """Number of classes K of a data set; 0 if it has no labels."""
    return max(len(class_names) if labels.max() >= 0 else 0, int(labels.max()) + 1)


def check_classes(
    train_set: ImageSet,
    *,
    asked: str = "eval.features has 'classifier'",
    remedy: str = "use --eval.features=[random], or inception with its weights",
) -> int:
    """The number of classes; raise ValueError, which says what `asked` for them, if there are fewer than two."""
    num_classes = class_count(train_set.labels, train_set.class_names)
    if num_classes < 2:
        raise ValueError(f"{asked}, but the training images have no labels of at least two classes; {remedy}")
    return num_classes


def train_classifier(
    config: ClassifierConfig,
    *,
    train_set: ImageSet,
    test_set: ImageSet,
    run: RunConfig,
    device: Device,
    name: str = "classifier",
) -> tuple[Classifier, dict[str, Any]]:
    """Train the classifier into run.folder/eval/<name>, or load it from there or from `config.path`.

    Returns the network in eval mode on the device, and its card with `accuracy` on the test split. Every process of a
    run must call it.

    Raises:
        ValueError: the data set has no labels, or the stored classifier is of other data or another configuration.
    """
    num_classes = check_classes(train_set)
    if config.path is not None:
        return load_classifier(Path(config.path), num_classes=num_classes, device=device)
    folder = run.folder / "eval" / name
    identity = {"classifier": to_dict(config), "data": train_set.content()}
    if not is_finished(folder, identity, DEFAULTS):
        _train(config, identity, folder, train_set=train_set, test_set=test_set, run=run, device=device)
    return load_classifier(folder, num_classes=num_classes, device=device)


def load_classifier(folder: Path, *, num_classes: int, device: Device) -> tuple[Classifier, dict[str, Any]]:
    """A stored classifier in eval mode, with its card.

    Raises:
        ValueError: none there, cut or altered files, or other classes than `num_classes`.
    """
    card, weights = load_model(folder)
    if card.get("kind") != "classifier" or card["num_classes"] != num_classes:
        found = f"a {card.get('kind')!r} of {card.get('num_classes')} classes"
        raise ValueError(f"classifier: {folder} holds {found}; the data set needs one of {num_classes} classes")
    network = Classifier(tuple(card["config"]["widths"]), num_classes)
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False).to(device.device), card


@torch.inference_mode()
def accuracy(network: Classifier, images: ImageSet, *, batch_size: int, device: torch.device) -> Estimate:
    """Top-1 accuracy over all labelled images of a split."""
    hits = count = 0
    for batch in images.in_order(batch_size):
        labels = batch["labels"]
        hits += int((network(batch["images"].to(device)).argmax(1).cpu() == labels).sum())
        count += int((labels >= 0).sum())
    return proportion(hits, count)


def _train(
    config: ClassifierConfig,
    identity: dict[str, Any],
    folder: Path,
    *,
    train_set: ImageSet,
    test_set: ImageSet,
    run: RunConfig,
    device: Device,
) -> None:
    num_classes = class_count(train_set.labels, train_set.class_names)
    task = ClassifierTask(config, num_classes)
    batches = Batches(train_set, batch_size=config.train.batch_size, seed=config.seed)
    weights = fit(
        task, batches, train=config.train, run=_judge_run(run, config), device=device, folder=folder,
        identity=identity, defaults=DEFAULTS,
    )  # fmt: skip
    if device.is_main:
        network = Classifier(config.widths, num_classes)
        network.load_state_dict(weights["classifier"])
        score = accuracy(network.eval(), test_set, batch_size=256, device=torch.device("cpu"))
        low, high = score.interval or (score.value, score.value)
        print(f"{folder.name}: {score.value:.2%} of the test images right ({low:.2%} to {high:.2%})")
        card = {"kind": "classifier", "config": identity["classifier"], "identity": identity}
        measured = {"num_classes": num_classes, "accuracy": score.value, "accuracy_interval": score.interval}
        save_model(folder, weights["classifier"], {**card, **measured})
    device.barrier()


def _judge_run(run: RunConfig, config: ClassifierConfig) -> RunConfig:
    """The judge's seed is its own, so that runs with different seeds are scored by the same network."""
    return replace(run, seed=config.seed, tensorboard=False)
