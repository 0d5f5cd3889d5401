"""A trained generator with the weights that are wanted: the model's, a snapshot's or an average of another width; and
the networks that sample with it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from engine.checkpoint import load_model, model_fingerprint
from engine.snapshots import averaged_at, read_snapshot
from generator.aligned_steps import read_aligned
from generator.autoregressive import Autoregressive
from generator.diffusion import Diffusion, trained_curriculum
from generator.order import fold_order

# Keys of a sample section that choose networks: settled by loading them.
CHOICES = ("snapshot", "ema_width", "guide", "outside")


def load_generator(
    path: str | Path,
    family: str,
    *,
    snapshot: int | None = None,
    ema_width: float | None = None,
    guide: str | None = None,
    outside: str | None = None,
) -> Autoregressive | Diffusion:
    """A trained generator from a run folder or a family's folder: eval mode, float32, on the CPU.

    Steps that were optimised for a diffusion model come as its `.aligned`, refused at sampling if they are another's.

    Args:
        path: where it is; snapshots lie there too.
        family: `autoregressive` or `diffusion`.
        snapshot: the training step whose averaged weights are taken; without it those of the trained model.
        ema_width: sigma_rel of an average that is reconstructed from the snapshots up to that step.
        guide: folder of a diffusion model, or `step-<k>`, a snapshot of this one: comes as `.guide` of the generator,
            which refuses it at sampling if it knows other latents or classes.
        outside: folder of a diffusion model, which serves the noise levels outside of the cluster that this one was
            trained on: comes as `.outside`, refused at sampling likewise, with its trained weights whatever `snapshot`
            and `ema_width` are taken here.

    Raises:
        ValueError: there is no finished generator of this family or no such snapshot, files were cut or altered, the
            snapshots hold no averages for another width, the guide is no other diffusion model, or outside is none
            that knows all noise levels.
    """
    folder = Path(path)
    folder = folder / family if (folder / family).is_dir() else folder
    card, weights = _load_weights(folder, snapshot, ema_width)
    if card.get("family") != family:
        raise ValueError(f"{folder / 'model.json'} describes {card.get('family')!r}, not family={family!r}")
    if family == "diffusion":
        generator = Diffusion.from_card(card, weights)
        generator.guide = None if guide is None else _load_guide(guide, folder, generator)
        generator.outside = None if outside is None else load_outside(outside)
        generator.aligned = read_aligned(folder)
        return generator
    for key, named in (("guide", guide), ("outside", outside)):
        if named is not None:
            raise ValueError(f"{key}={named!r} is of a diffusion model, but family={family!r}")
    return Autoregressive.from_card(card, weights)


def load_outside(outside: str) -> Diffusion:
    """The network in this folder that is to serve the noise levels which another one was not trained on.

    Raises:
        ValueError: there is no finished diffusion model, or it was itself trained on one cluster of levels.
    """
    try:
        found = load_generator(outside, "diffusion")
    except ValueError as error:
        raise ValueError(f"diffusion.sample.outside={outside!r}: {error}") from error
    assert isinstance(found, Diffusion)
    if trained_curriculum(found.card).kind == "single":
        raise ValueError(
            f"diffusion.sample.outside={outside!r} was itself trained on one cluster of noise levels alone: name a"
            " model that was trained on all of them"
        )
    return found


def which_weights(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings of a sample section those that `load_generator` takes."""
    return {key: settings[key] for key in CHOICES if key in settings}


def _load_weights(
    folder: Path, snapshot: int | None, ema_width: float | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Card and weights; the card has the fingerprint of just these weights."""
    card, weights = load_model(folder)
    if snapshot is None and ema_width is None:
        return card, weights
    step = card["train"]["steps"] if snapshot is None else snapshot
    found = read_snapshot(folder, step) if ema_width is None else averaged_at(folder, step, ema_width)
    weights = fold_order(found)
    digest = hashlib.sha256(safetensors.torch.save(weights)).hexdigest()
    return {**card, "sha256": digest, "fingerprint": model_fingerprint(card["config"], digest)}, weights


def _load_guide(guide: str, folder: Path, generator: Diffusion) -> Diffusion:
    """The network that guides a generator whose folder this is."""
    step = re.fullmatch(r"step-(\d+)", guide)
    try:
        found = load_generator(folder if step else guide, "diffusion", snapshot=int(step[1]) if step else None)
    except ValueError as error:
        raise ValueError(f"diffusion.sample.guide={guide!r}: {error}") from error
    assert isinstance(found, Diffusion)
    if found.fingerprint == generator.fingerprint:
        raise ValueError(f"diffusion.sample.guide={guide!r} is the very network that it shall guide: name a weaker one")
    return found
