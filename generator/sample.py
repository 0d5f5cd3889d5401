"""Images from a trained generator: by condition and seed in memory, code by code, or as PNG files with samples.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import RunConfig, to_dict
from engine.device import Device
from engine.log import progress
from generator.autoregressive import Autoregressive
from generator.card import family_of
from generator.config import AutoregressiveConfig, DiffusionConfig
from generator.diffusion import Diffusion
from generator.inputs import Inputs, choose_inputs
from generator.partial import paint_partial
from generator.sample_folder import (
    begin,
    check_replaceable,
    deciding,
    draft_of,
    is_answered,
    png_path,
    publish,
    read_samples,
    write_png,
)
from generator.snapshots import load_generator, which_weights
from generator.watch import Watch, check_streams, watching
from tokenizer.model import Tokenizer, load_tokenizer

SEEDS_PER_RUN = 1_000_000  # sample k of seed s draws from s * SEEDS_PER_RUN + k, so other seeds share no noise


def open_generator(path: str | Path, config: AutoregressiveConfig | DiffusionConfig) -> Autoregressive | Diffusion:
    """The generator that a configuration samples from: of its family, with the weights and the other networks it names.

    Raises:
        ValueError: as `load_generator`.
    """
    return load_generator(path, family_of(config), **which_weights(dataclasses.asdict(config.sample)))


def sample_images(
    generator: Autoregressive | Diffusion,
    tokenizer: Tokenizer,
    condition: Any,
    seeds: Sequence[int],
    *,
    batch_size: int = 64,
    watch: Watch | None = None,
    **settings: Any,
) -> Tensor:
    """Images uint8 [B, 3, H, W] on the CPU, one for each seed; image k depends on seed k and condition k alone.

    The condition is as the generator was trained: labels int64 [B], where -1 is none; B texts; or latents float32
    [B, C, h, w] of smaller images. None stands for no condition at all.

    Both models must be on one device. Batches always have `batch_size` rows, so that the last and the first agree to
    the bit; another batch_size changes images by rounding alone, which in bf16 makes many of them others. `settings`
    are keys of the family's sample section. `watch(codes, done)`, if given, sees the codes [n, T] of every
    autoregressive batch each time that one more of them stands.

    Raises:
        ValueError: another tokenizer made the codes that the generator learned from, or a condition or setting is
            wrong.
    """
    _check_pair(generator, tokenizer)
    condition = condition.cpu() if isinstance(condition, Tensor) else condition
    generator.condition.rows(condition, len(seeds))  # wrong ones of the last batch are refused before the first
    decode = tokenizer.from_latents if isinstance(generator, Diffusion) else tokenizer.decode
    parts = []
    for rows in torch.arange(len(seeds)).split(batch_size):
        filled = rows.tolist() + rows[-1:].tolist() * (batch_size - len(rows))
        chosen, count = [seeds[row] for row in filled], len(rows)
        made = _codes_or_latents(generator, _chosen(condition, filled), chosen, settings, watch, count)
        parts.append(decode(made)[:count].cpu())  # [n, 3, H, W]
    return torch.cat(parts)


def stream_images(
    generator: Autoregressive | Diffusion,
    tokenizer: Tokenizer,
    condition: Any,
    seeds: Sequence[int],
    *,
    every: int,
    **settings: Any,
) -> Iterator[tuple[int, Tensor]]:
    """Images as they grow: (codes that stand, uint8 [B, 3, H, W] on the CPU), after every `every` codes and the last.

    What is not decoded yet is grey. The seeds are one batch, so the last images are those of `sample_images` with
    `batch_size=len(seeds)`. Arguments as of `sample_images`.

    Raises (at the call, not at the first image):
        ValueError: as `sample_images`, `every` below 1, or a family that does not go code by code.
    """
    check_streams(generator)
    _check_pair(generator, tokenizer)
    if every < 1:
        raise ValueError(f"every={every} must be at least 1 code")
    assert isinstance(generator, Autoregressive)
    steps = generator.stream(condition, seeds, **settings)
    return (
        (done, paint_partial(tokenizer, codes, done).cpu())
        for done, codes in steps
        if done % every == 0 or done == codes.shape[1]
    )


def sample(
    *,
    run: RunConfig,
    config: AutoregressiveConfig | DiffusionConfig,
    family: str,
    device: Device,
    num: int = 64,
    label: int | None = None,
    prompts: Sequence[str] = (),
    images: Sequence[Path] = (),
    seed: int = 0,
    out: str | Path | None = None,
    decoder: str | Path | None = None,
    candidates: int = 0,
    known: Sequence[Path] = (),
    partial: Path | None = None,
) -> Path:
    """Write `num` images as 000000.png ..., grid.png and samples.json; returns their folder.

    What is there already and answers the same request is kept, and an interrupted call continues where it stopped.
    Every process of a run must call it.

    Args:
        label: class of all images; without it the classes take turns.
        prompts, images: texts or files of smaller images to draw from in turn, see `choose_inputs`.
        out: stands for `run.folder/samples/<family>`.
        decoder: run whose tokenizer paints the images: one that shares encoder and codebook.
        candidates: draw at least so many instead, whose classes go round and round through those of the `num`.
        known: folders of samples; those of the same models, settings, class and seed are taken over from there.
        partial: picture of the first process's unfinished images, rewritten about every second, gone at the end and
            after an exception; a process that is killed leaves it to the next such call.

    Raises:
        ValueError: a missing or foreign model, a wrong label or setting, `out` holds other files, or partial pictures
            are asked of a family that has none.
    """
    generator = open_generator(run.folder, config).to(device.device)
    tokenizer = load_tokenizer(decoder or run.tokenizer_folder).to(device.device)
    if partial is not None:
        check_streams(generator)
    folder = Path(out) if out is not None else run.folder / "samples" / family
    inputs = choose_inputs(generator, run, num=num, label=label, prompts=prompts, images=images)
    request = sample_request(generator, tokenizer, config, inputs, num=num, seed=seed, candidates=candidates)
    if is_answered(read_samples(folder), request, more=bool(candidates)):
        return folder
    draft = draft_of(folder)
    if device.is_main:
        check_replaceable(folder)
        begin(draft, request, [folder, *known])
    device.barrier()
    with watching(tokenizer, partial if device.is_main else None) as watch:
        _fill(draft, generator, tokenizer, request, inputs, device, watch=watch, **dataclasses.asdict(config.sample))
    device.barrier()
    if device.is_main:
        publish(draft, folder, request)
    device.barrier()
    return folder


def sample_request(
    generator: Autoregressive | Diffusion,
    tokenizer: Tokenizer,
    config: AutoregressiveConfig | DiffusionConfig,
    inputs: Inputs,
    *,
    num: int,
    seed: int = 0,
    candidates: int = 0,
) -> dict[str, Any]:
    """All that decides the images of `sample`, as it stands in samples.json.

    Raises:
        ValueError: `num` below 1.
    """
    if num < 1:
        raise ValueError(f"num={num} must be at least 1")
    rows = range(candidates or num)
    companions = getattr(generator, "companions", {})
    return {
        "family": generator.family,
        "generator": generator.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        **{key: other.fingerprint for key, other in companions.items()},
        "settings": deciding(_told_settings(generator, config)),
        **({} if generator.condition.kind == "class" else {"condition": generator.condition.kind}),
        "class_names": list(generator.class_names),
        **inputs.told([row % num for row in rows]),
        "seeds": [seed * SEEDS_PER_RUN + row for row in rows],
    }


def _told_settings(
    generator: Autoregressive | Diffusion, config: AutoregressiveConfig | DiffusionConfig
) -> dict[str, Any]:
    """The sample section; of optimised steps with the levels that they are now."""
    told = to_dict(config.sample)
    if isinstance(config, DiffusionConfig) and isinstance(generator, Diffusion) and config.sample.steps == "aligned":
        told["levels"] = generator.levels(config.sample).tolist()
    return told


def _check_pair(generator: Autoregressive | Diffusion, tokenizer: Tokenizer) -> None:
    if generator.tokenizer_fingerprint != tokenizer.code_fingerprint:
        raise ValueError(
            f"this generator learned from codes {generator.tokenizer_fingerprint}, not {tokenizer.code_fingerprint}:"
            " load the tokenizer of its own run, or train the generator again"
        )


def _chosen(condition: Any, rows: Sequence[int]) -> Any:
    """These rows of a condition."""
    if condition is None or isinstance(condition, Tensor):
        return None if condition is None else condition[rows]
    return [condition[row] for row in rows]


def _codes_or_latents(
    generator: Autoregressive | Diffusion,
    condition: Any,
    seeds: Sequence[int],
    settings: dict[str, Any],
    watch: Watch | None,
    shown: int,
) -> Tensor:
    """What the tokenizer turns into images; `watch` sees the first `shown` rows on the way."""
    if watch is None or isinstance(generator, Diffusion):
        return generator.sample(condition, seeds, **settings)
    for done, codes in generator.stream(condition, seeds, **settings):
        watch(codes[:shown], done)
    return codes  # [B, T]


def _fill(
    draft: Path,
    generator: Autoregressive | Diffusion,
    tokenizer: Tokenizer,
    request: dict[str, Any],
    inputs: Inputs,
    device: Device,
    *,
    batch_size: int,
    watch: Watch | None,
    **settings: Any,
) -> None:
    """Write this process's share of the PNG files that are not there yet."""
    seeds = request["seeds"]
    parts = torch.arange(len(seeds)).split(batch_size)[device.rank :: device.world]
    total = sum(len(part) for part in parts)
    with progress(total=total, title=f"samples/{generator.family}", unit="image", enabled=device.is_main) as bar:
        for part in parts:
            rows = part.tolist()
            if not all(png_path(draft, row).exists() for row in rows):
                chosen = [seeds[row] for row in rows]
                condition = inputs.condition(rows)
                images = sample_images(
                    generator, tokenizer, condition, chosen, batch_size=batch_size, watch=watch, **settings
                )
                for row, image in zip(rows, images, strict=True):
                    write_png(png_path(draft, row), image)
            bar.update(len(rows))
