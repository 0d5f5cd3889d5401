"""Images from a trained generator: by label and seed in memory, or as PNG files beside samples.json."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.checkpoint import load_model, write_json
from engine.config import RunConfig
from engine.device import Device
from engine.log import progress, save_grid
from generator.autoregressive import Autoregressive
from generator.condition import null_unknown
from generator.config import AutoregressiveConfig, DiffusionConfig
from generator.diffusion import Diffusion
from tokenizer.model import Tokenizer, load_tokenizer

SEEDS_PER_RUN = 1_000_000  # sample k of seed s draws from s * SEEDS_PER_RUN + k, so other seeds share no noise
GRID_CLASSES, GRID_COLUMNS = 10, 8


def load_generator(path: str | Path, family: str) -> Autoregressive | Diffusion:
    """A trained generator from a run folder or a family's folder: averaged weights, eval mode, float32, on the CPU.

    Raises:
        ValueError: there is no finished generator of this family, or its files were cut or altered.
    """
    folder = Path(path)
    folder = folder / family if (folder / family).is_dir() else folder
    card, weights = load_model(folder)
    if card.get("family") != family:
        raise ValueError(f"{folder / 'model.json'} describes {card.get('family')!r}, not family={family!r}")
    kind = Autoregressive if family == "autoregressive" else Diffusion
    return kind.from_card(card, weights)


def sample_images(
    generator: Autoregressive | Diffusion,
    tokenizer: Tokenizer,
    labels: Tensor | None,
    seeds: Sequence[int],
    *,
    batch_size: int = 64,
    **settings: Any,
) -> Tensor:
    """Images uint8 [B, 3, H, W] on the CPU, one for each seed; image k depends on seed k and label k alone.

    Both models must be on one device. Batches always have `batch_size` rows, so that the last and the first agree to
    the bit. `settings` are keys of the family's sample section; labels of -1, or None, mean no class.

    Raises:
        ValueError: another tokenizer made the codes that the generator learned from, or a label or setting is wrong.
    """
    if generator.tokenizer_fingerprint != tokenizer.code_fingerprint:
        raise ValueError(
            f"this generator learned from codes {generator.tokenizer_fingerprint}, not {tokenizer.code_fingerprint}:"
            " load the tokenizer of its own run, or train the generator again"
        )
    labels = torch.full((len(seeds),), -1) if labels is None else labels.cpu()
    null_unknown(labels, generator.num_classes)
    rows = torch.arange(len(seeds)).split(batch_size)
    return torch.cat([_one_batch(generator, tokenizer, labels, seeds, part, batch_size, settings) for part in rows])


def sample(
    *,
    run: RunConfig,
    config: AutoregressiveConfig | DiffusionConfig,
    family: str,
    device: Device,
    num: int = 64,
    label: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    decoder: str | Path | None = None,
) -> Path:
    """Write `num` images as 000000.png ..., grid.png and samples.json; returns their folder.

    Without `label` the classes take turns. `out` stands for `run.folder/samples/<family>`, and `decoder` for the run
    whose tokenizer paints the images: one that shares encoder and codebook. What is there already and answers the same
    request is kept, and an interrupted call continues where it stopped.

    Raises:
        ValueError: a missing or foreign model, a wrong label or setting, or `out` holds other files.
    """
    generator = load_generator(run.folder, family).to(device.device)
    tokenizer = load_tokenizer(decoder or run.folder).to(device.device)
    folder = Path(out) if out is not None else run.folder / "samples" / family
    request = _request(generator, tokenizer, config, num=num, label=label, seed=seed)
    if _read(folder / "samples.json") == request:
        return folder
    draft = folder.with_name(f".draft-{folder.name}")
    if device.is_main:
        _check_replaceable(folder)
        _begin(draft, request)
    device.barrier()
    _fill(draft, generator, tokenizer, request, device, batch_size=config.sample.batch_size)
    device.barrier()
    if device.is_main:
        _publish(draft, folder, request)
    device.barrier()
    return folder


def _one_batch(
    generator: Autoregressive | Diffusion,
    tokenizer: Tokenizer,
    labels: Tensor,
    seeds: Sequence[int],
    rows: Tensor,
    batch_size: int,
    settings: dict[str, Any],
) -> Tensor:
    filled = rows.tolist() + rows[-1:].tolist() * (batch_size - len(rows))
    made = generator.sample(labels[filled], [seeds[row] for row in filled], **settings)
    images = tokenizer.decode(made) if generator.family == "autoregressive" else tokenizer.from_latents(made)
    return images[: len(rows)].cpu()                                              # [n, 3, H, W]


def _request(
    generator: Autoregressive | Diffusion,
    tokenizer: Tokenizer,
    config: AutoregressiveConfig | DiffusionConfig,
    *,
    num: int,
    label: int | None,
    seed: int,
) -> dict[str, Any]:
    """All that decides the images, as it stands in samples.json."""
    if num < 1:
        raise ValueError(f"num={num} must be at least 1")
    turns = [index % generator.num_classes for index in range(num)] if generator.num_classes else [-1] * num
    labels = turns if label is None else [label] * num
    null_unknown(torch.tensor(labels), generator.num_classes)
    speed = ("batch_size", "compile")
    return {
        "family": generator.family,
        "generator": generator.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "settings": {key: value for key, value in dataclasses.asdict(config.sample).items() if key not in speed},
        "class_names": list(generator.class_names),
        "labels": labels,
        "seeds": [seed * SEEDS_PER_RUN + index for index in range(num)],
    }


def _fill(
    draft: Path,
    generator: Autoregressive | Diffusion,
    tokenizer: Tokenizer,
    request: dict[str, Any],
    device: Device,
    *,
    batch_size: int,
) -> None:
    """Write this process's share of the PNG files that are not there yet."""
    labels, seeds = torch.tensor(request["labels"]), request["seeds"]
    parts = torch.arange(len(seeds)).split(batch_size)[device.rank :: device.world]
    total = sum(len(part) for part in parts)
    with progress(total=total, title=f"samples/{generator.family}", unit="image", enabled=device.is_main) as bar:
        for part in parts:
            rows = part.tolist()
            if not all(_png(draft, row).exists() for row in rows):
                chosen = [seeds[row] for row in rows]
                images = sample_images(
                    generator, tokenizer, labels[part], chosen, batch_size=batch_size, **request["settings"]
                )
                for row, image in zip(rows, images, strict=True):
                    _write_png(_png(draft, row), image)
            bar.update(len(rows))


def _begin(draft: Path, request: dict[str, Any]) -> None:
    """A draft folder for this request; what an interrupted call left of the same request stays."""
    if _read(draft / "request.json") != request:
        shutil.rmtree(draft, ignore_errors=True)
        write_json(draft / "request.json", request)


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not (folder / "samples.json").exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files but no samples.json: choose another folder, or empty it")


def _publish(draft: Path, folder: Path, request: dict[str, Any]) -> None:
    """Add the grid and samples.json, then put the draft in the place of older samples."""
    shown, columns = grid_rows(request["labels"])
    images = np.stack([np.asarray(Image.open(_png(draft, row))) for row in shown])            # [n, H, W, 3]
    save_grid(torch.from_numpy(images).permute(0, 3, 1, 2), draft / "grid.png", columns=columns)
    write_json(draft / "samples.json", request)
    old = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    (folder / "request.json").unlink()


def grid_rows(labels: Sequence[int]) -> tuple[list[int], int]:
    """Which samples a grid shows, and in how many columns: one row for each of the first classes."""
    classes = sorted(set(labels))[:GRID_CLASSES]
    members = [[row for row, label in enumerate(labels) if label == each] for each in classes]
    if len(members) == 1:
        return members[0][: GRID_COLUMNS**2], min(GRID_COLUMNS, len(members[0]))
    columns = min(GRID_COLUMNS, *(len(rows) for rows in members))
    return [row for rows in members for row in rows[:columns]], columns


def _png(folder: Path, row: int) -> Path:
    return folder / f"{row:06d}.png"


def _write_png(path: Path, image: Tensor) -> None:
    """Write uint8 [3, H, W]; a killed process leaves no half file under the final name."""
    draft = path.with_suffix(".part")
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(draft, format="PNG")
    draft.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON in a file; None if there is none or it is cut."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
