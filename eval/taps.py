"""What the linear probe looks at: pooled activations of the trained models at their taps, and raw pixels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.device import exact_products
from engine.images import ImageSet, to_float
from engine.log import progress
from eval.config import ProbeConfig
from eval.judge import data_facts, draw_indices, drawn_batches
from eval.probe import TapScore, best_tap, probe_curve
from eval.protocol import Record, protocol, record

PIXEL_SIDE = 32  # larger images are shrunk for the pixel baseline
RANDOM_SEED = 0  # of the untrained twin


class Representation(NamedTuple):
    """A family with named taps; `features(images, taps)` gives float [B, D] for each tap."""

    family: str
    taps: tuple[str, ...]
    features: Callable[[Tensor, Sequence[str]], list[Tensor]]
    facts: dict[str, Any]


def pixel_representation() -> Representation:
    """Raw pixels, shrunk to at most 32 x 32."""
    return Representation("pixels", ("pixels",), lambda images, taps: [_pixels(images)], {})


def tokenizer_representation(tokenizer: Any) -> Representation:
    """Activations of the tokenizer's encoder."""

    def features(images: Tensor, taps: Sequence[str]) -> list[Tensor]:
        return [tokenizer.features(images, tap) for tap in taps]

    return Representation("tokenizer", tuple(tokenizer.taps), features, {"tokenizer": tokenizer.fingerprint})


Encode = Callable[[Tensor], Tensor]  # uint8 images [B, 3, H, W] -> codes int64 [B, T]


def encoded_once(tokenizer: Any) -> Encode:
    """The tokenizer's `encode` for several representations of the same images: each batch is encoded for the first."""
    known: dict[bytes, Tensor] = {}

    def encode(images: Tensor) -> Tensor:
        key = hashlib.sha256(images.cpu().numpy().tobytes()).digest()
        if key not in known:
            known[key] = tokenizer.encode(images).cpu()
        return known[key].to(images.device)

    return encode


def generator_representation(generator: Any, tokenizer: Any, encode: Encode) -> Representation:
    """Activations of a generator's blocks over the codes or latents of real images, behind the null label."""
    codes = encode if generator.family == "autoregressive" else tokenizer.to_latents
    facts = {"generator": generator.fingerprint, "tokenizer": tokenizer.fingerprint}
    if generator.num_classes and not generator.label_dropout:
        print(
            f"probe: {generator.family} was trained with label_dropout=0 and never saw the null label that its features"
            f" stand behind; for a fair probe train with {generator.family}.model.label_dropout above 0"
        )
        facts["null_label"] = "never trained"
    return Representation(generator.family, tuple(generator.taps), _features_of(generator, codes), facts)


def random_representation(generator: Any, tokenizer: Any, encode: Encode) -> Representation:
    """The same architecture as an autoregressive generator with fresh weights: what training must beat."""
    twin = generator.randomised(RANDOM_SEED)
    facts = {
        "generator": generator.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "weights": f"random, seed {RANDOM_SEED}",
    }
    return Representation(f"{generator.family}_random", tuple(twin.taps), _features_of(twin, encode), facts)


def _features_of(generator: Any, encode: Encode) -> Callable[[Tensor, Sequence[str]], list[Tensor]]:
    def features(images: Tensor, taps: Sequence[str]) -> list[Tensor]:
        tokens = encode(images)
        if generator.family == "autoregressive":
            return generator.features_at(tokens, taps)
        return [generator.features(tokens, tap) for tap in taps]

    return features


def probe_representation(
    representation: Representation,
    config: ProbeConfig,
    *,
    train_set: ImageSet,
    test_set: ImageSet,
    batch_size: int,
    device: torch.device,
) -> tuple[Record, list[dict[str, Any]]]:
    """Probe every chosen tap: the record of the best one (best on held-out training images) and the whole curve.

    Raises:
        ValueError: a tap in eval.probe.taps that the family does not have.
    """
    taps = chosen_taps(representation, config)
    train, train_labels = _collect(representation, taps, train_set, config.num_train, batch_size, device)
    test, test_labels = _collect(representation, taps, test_set, config.num_test, batch_size, device)
    pairs = {tap: (train[tap], test[tap]) for tap in taps}
    curve = probe_curve(pairs, train_labels, test_labels, c_grid=config.c_grid, held_out=config.held_out)
    best = best_tap(curve)
    stated = protocol(
        settings={"c_grid": config.c_grid, "held_out": config.held_out, "num_train": len(train_labels)},
        num_real=len(test_labels),
        **data_facts(test_set),
        reference=[train_set.identity().get("digest"), test_set.identity().get("digest")],
        subject=representation.facts,
    )
    entry = record("probe_top1", representation.family, best.test, n=len(test_labels), protocol=stated, tap=best.tap)
    return entry, [_row(representation.family, score) for score in curve]


def chosen_taps(representation: Representation, config: ProbeConfig) -> tuple[str, ...]:
    """The taps of a family that are to be probed; the pixel baseline always is.

    Raises:
        ValueError: none of the listed taps is the family's.
    """
    if config.taps == "all" or representation.family == "pixels":
        return representation.taps
    taps = tuple(tap for tap in config.taps if tap in representation.taps)
    if not taps:
        listed, known = ", ".join(config.taps), ", ".join(representation.taps)
        raise ValueError(f"eval.probe.taps={listed}: none is a tap of {representation.family}, which has {known}")
    return taps


def _collect(
    representation: Representation,
    taps: Sequence[str],
    images: ImageSet,
    num: int,
    batch_size: int,
    device: torch.device,
) -> tuple[Mapping[str, Tensor], Tensor]:
    """Features {tap: float32 [N, D]} and labels [N] of labelled images, centre crop, no augmentation."""
    indices = draw_indices(np.flatnonzero(images.labels >= 0), num, seed=0)
    parts: dict[str, list[Tensor]] = {tap: [] for tap in taps}
    labels = []
    title = f"probe/{representation.family}/{images.split}"
    with exact_products(), progress(total=len(indices), title=title, unit="image") as bar:
        for batch in drawn_batches(images, indices, batch_size):
            found = representation.features(batch["images"].to(device), taps)
            for tap, features in zip(taps, found, strict=True):
                parts[tap].append(features.float().cpu())
            labels.append(batch["labels"])
            bar.update(len(batch["labels"]))
    # Outside inference mode the clones may take part in the probe's autograd.
    return {tap: torch.cat(rows).clone() for tap, rows in parts.items()}, torch.cat(labels).clone()


def _pixels(images: Tensor) -> Tensor:
    x = to_float(images)
    if max(x.shape[-2:]) > PIXEL_SIDE:
        x = F.interpolate(x, (PIXEL_SIDE, PIXEL_SIDE), mode="bilinear", antialias=True)
    return x.flatten(1)  # [B, 3 * side * side]


def _row(family: str, score: TapScore) -> dict[str, Any]:
    low, high = score.test.interval or (math.nan, math.nan)
    return {
        "family": family,
        "tap": score.tap,
        "c": score.c,
        "held_out_top1": score.held_out,
        "test_top1": score.test.value,
        "interval": [low, high],
    }
