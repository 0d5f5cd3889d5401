"""The public Python interface: what the commands use, on arrays instead of files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.device import Device, setup
from generator.sample import load_generator, sample_images, stream_images
from generator.smaller import enlarged_latents
from generator.snapshots import which_weights
from tokenizer import model
from tokenizer.model import Tokenizer
from tokenloom.run_files import tokenizer_folder

__all__ = ["load_generator", "load_tokenizer", "reconstruct", "sample", "score", "score_images", "stream"]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a run, its own or that of the run that it names, or of an exported or a tokenizer's folder.

    It comes with averaged weights, in eval mode, float32, on the CPU.

    Raises:
        ValueError: there is no complete tokenizer, or its files were cut or altered.
    """
    return model.load_tokenizer(tokenizer_folder(Path(path)))


def sample(
    path: str | Path,
    family: str,
    *,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    images: Tensor | None = None,
    seeds: Sequence[int],
    **settings: Any,
) -> Tensor:
    """Images from a run or exported folder, uint8 [B, 3, H, W]; image k depends on seeds[k] and its condition alone.

    Args:
        path: a run folder, or one written by `tokenloom export`.
        family: `autoregressive` or `diffusion`.
        labels: a class for each seed; None draws without a class.
        prompts: a text for each seed, where the generator takes texts.
        images: a smaller image for each seed, uint8 [B, 3, s, s], where the generator takes such.
        settings: keys of the family's `sample` section, such as `temperature` or `guidance`; the others are as trained.

    Raises:
        ValueError: a missing model, an unknown setting, a condition of another kind than the generator takes, or one
            that is not as long as the seeds.
    """
    generator, tokenizer = load_generator(path, family), load_tokenizer(path)
    chosen = {**_trained_settings(generator), **settings}
    weights = {key: value for key, value in which_weights(chosen).items() if value is not None}
    if weights:
        generator = load_generator(path, family, **weights)
    condition = _condition(generator, tokenizer, seeds, labels=labels, prompts=prompts, images=images)
    return sample_images(generator, tokenizer, condition, list(seeds), **chosen)


def stream(
    path: str | Path,
    *,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int],
    every: int | None = None,
    **settings: Any,
) -> Iterator[tuple[int, Tensor]]:
    """Autoregressive images as they grow: pairs of the number of codes that stand and the images, uint8 [B, 3, H, W].

    What is not decoded yet is grey. The last pair holds the images of `sample`, to rounding, or to the bit with its
    batch_size set to the number of seeds.

    Args:
        path, labels, prompts, seeds, settings: as of `sample`.
        every: codes between two pairs; None: a row of the code grid.

    Raises:
        ValueError: as `sample`, or there is no autoregressive generator: the samples of others do not grow by codes.
    """
    folder = Path(path)
    if not any((place / "model.json").is_file() for place in (folder, folder / "autoregressive")):
        raise ValueError(f"{folder} holds no autoregressive generator, whose samples alone grow code by code")
    generator, tokenizer = load_generator(path, "autoregressive"), load_tokenizer(path)
    row = tokenizer.length // tokenizer.grid[0]
    chosen = {**_trained_settings(generator), **settings}
    wanted = _condition(generator, tokenizer, seeds, labels=labels, prompts=prompts, images=None)
    return stream_images(generator, tokenizer, wanted, list(seeds), every=row if every is None else every, **chosen)


def _condition(generator: Any, tokenizer: Tokenizer, seeds: Sequence[int], **given: Any) -> Any:
    """What is given of labels, prompts and images, as the generator takes it."""
    wanted = {"class": "labels", "text": "prompts", "image": "images"}[generator.condition.kind]
    if isinstance(given["prompts"], str):
        raise ValueError(f"prompts={given['prompts']!r} is one text: give a list, with one for each seed")
    for name, values in given.items():
        if values is not None and name != wanted:
            raise ValueError(f"{name} were given, but this generator was trained on {wanted}: give those")
        if values is not None and len(values) != len(seeds):
            raise ValueError(f"{name} has {len(values)} entries, seeds {len(seeds)}: give one for each seed")
    values = given[wanted]
    if values is None or wanted == "prompts":
        return None if values is None else list(values)
    if wanted == "labels":
        return torch.tensor(list(values))
    return enlarged_latents(tokenizer, values, factor=generator.condition.factor)


def _trained_settings(generator: Any) -> dict[str, Any]:
    """The settings of the run's own samples; compilation, which takes a minute, must be asked for."""
    return {key: value for key, value in generator.card["sample"].items() if key != "compile"}


def reconstruct(path: str | Path | Tokenizer, images: Tensor) -> Tensor:
    """Images uint8 [B, 3, H, W] through the tokenizer's bottleneck and back, alike."""
    tokenizer = path if isinstance(path, Tokenizer) else load_tokenizer(path)
    return tokenizer.reconstruct(images)[0]


def score(path: str | Path, *, only: str | None = None, device: Device | None = None) -> list[dict[str, Any]]:
    """Measure a run as `tokenloom eval` does, with the configuration that it keeps; returns the records.

    Raises:
        ValueError: the folder is no run, or something that is to be measured is missing.
    """
    from tokenloom import pipeline
    from tokenloom.experiment import load_experiment

    folder = Path(path)
    if not (folder / "config.yaml").exists():
        raise ValueError(f"{folder / 'config.yaml'} is missing: give the folder of a run")
    place = [f"--run.root={folder.parent}", f"--run.name={folder.name}"]
    experiment = load_experiment(["--config", str(folder / "config.yaml"), *place])
    return pipeline.evaluate(experiment, device or setup(experiment.run), only=only)


def score_images(
    generated: str | Path,
    reference: str | Path,
    *,
    features: Sequence[str] = ("inception",),
    size: int | None = None,
    num: int = 0,
    out: str | Path | None = None,
    device: Device | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Measure images of any maker as `tokenloom eval --generated A --reference B` does; returns the records.

    Args:
        generated: folder or zip of images, .npz, .npy or parquet file, or a run with samples.
        reference: the same of real images, or an .npz with mu and sigma; of a run its training images.
        features: entries of eval.features.
        size: crop all images to so many pixels; without it they must all have one size.
        num: score so many of them, drawn at random; 0 takes all.
        out: a .json to write them to; the sheet of nearest neighbours lies beside it.
        settings: other keys of the section `eval`.

    Raises:
        ValueError: nothing to read there, sizes that differ, missing weights, or too few images.
    """
    from eval.config import EvalConfig
    from eval.outside import OutsideConfig, judge_files

    config = OutsideConfig(eval=EvalConfig(features=tuple(features), **settings))
    return judge_files(
        generated, reference, config=config, device=device or setup(config.run), size=size, num=num,
        out=None if out is None else Path(out),
    )  # fmt: skip
