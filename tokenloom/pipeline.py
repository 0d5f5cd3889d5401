"""All stages of one YAML in order. Every stage skips what is done; training and sampling go on where they stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import eval.run as judge
from engine.batches import part_rows
from engine.checkpoint import write_atomic, write_json
from engine.config import difference, to_dict, to_yaml
from engine.device import Device, check_sampling_precision
from engine.images import ImageSet
from engine.log import clock
from engine.resume import completed
from engine.shards import Shards
from engine.sources import open_images
from eval.protocol import Record
from eval.restoration import check_enough_test
from eval.variants import check_samplings, drawn_from, names_weights, samplings
from generator import sample as sampling
from generator import train as generating
from generator.align import align_steps
from generator.aligned_steps import read_aligned
from generator.captions import encode_texts
from generator.condition_config import ConditionConfig, TextConfig, class_words
from generator.config import AutoregressiveConfig, DiffusionConfig
from tokenizer import encode as encoding
from tokenizer import train as tokenizing
from tokenizer.perceptual import open_perceptual
from tokenizer.smaller import check_factor
from tokenloom.dry_run import ASSUMED_CLASSES, build_stages, encoded_splits
from tokenloom.experiment import Experiment
from tokenloom.report import write_report
from tokenloom.steps_judge import check_judge, open_judge


def run_all(experiment: Experiment, device: Device) -> Path | None:
    """Tokenizer, codes, generators, samples, scores, report; returns the report's path on the first process.

    With run.tokenizer the first two stages are those of another run, which has finished them.
    """
    begun = time.monotonic()
    check(experiment, device)
    if experiment.run.tokenizer is None:
        train_tokenizer(experiment, device)
        encode(experiment, device)
    elif device.is_main:
        print(f"tokenizer, encode: those of {experiment.run.tokenizer}")
    for family, _ in experiment.generators():
        train_generator(experiment, device, family)
    for family, _ in experiment.generators():
        draw_samples(experiment, device, family)
    if not _is_scored(experiment):
        evaluate(experiment, device)
    elif device.is_main:
        print("eval: done before, nothing to do")
    if not device.is_main:
        return None
    report = write_report(experiment.run.folder)
    print(f"all stages done in {clock(time.monotonic() - begun)}; open {report}")
    return report


def check(experiment: Experiment, device: Device) -> None:
    """Raise now the ValueError that a later stage would raise after hours of training."""
    if experiment.run.tokenizer is not None:
        check_tokenizer(experiment)
    with torch.device("meta"):
        for stage in build_stages(experiment, ASSUMED_CLASSES):
            part_rows(stage.train.batch_size, 0, device.world * stage.train.accumulate)
    if experiment.run.tokenizer is None and experiment.tokenizer.loss.perceptual:
        open_perceptual(experiment.tokenizer.loss.perceptual_network, image_size=experiment.data.size)
    train_set, families = open_images(experiment.data, "train"), dict(experiment.generators())
    check_conditions(experiment, train_set)
    classes = len(train_set.class_names)
    check_samplings(experiment.eval, families, classes=classes, run=experiment.run.folder)
    for _, family, config in samplings(experiment.eval, families):
        check_sampling_precision(family, config.sample.precision, device.device)
    check_judge(experiment)
    judge.check(data=experiment.data, eval=experiment.eval, device=device)


def check_conditions(experiment: Experiment, train_set: ImageSet) -> None:
    """Raise ValueError unless there will be the captions and smaller images that the generators are told."""
    own, factor = experiment.run.tokenizer is None, experiment.tokenizer.low_resolution
    if own and factor is not None:
        check_factor(experiment.data.size, factor)
    for family, config in experiment.generators():
        condition = config.condition
        if own and condition.kind == "image" and factor is None:
            raise ValueError(
                f"{family}.condition.kind=image needs smaller versions of the images beside their latents: set"
                " tokenizer.low_resolution, to 4 for instance"
            )
        if _reads_captions(condition) and train_set.captions is None:
            raise ValueError(
                f"{family}.condition.text.captions=data, but the images have no captions: set data.caption_column, or"
                " captions=templates"
            )
        if condition.kind == "text" and condition.text.captions == "templates":
            _check_templates(condition.text, train_set.class_names)
    check_enough_test(experiment.eval, experiment.diffusion, open_images(experiment.data, "test"))


def _check_templates(config: TextConfig, class_names: Sequence[str]) -> None:
    """Raise ValueError unless there are classes, and their names fit into all templates, the held-out ones too."""
    words = [word for each in class_words(config, class_names) for word in each]
    templates = (*config.templates, *config.held_out)
    encode_texts(config, [template.replace("{}", word) for template in templates for word in words], whole=True)


def _reads_captions(condition: ConditionConfig) -> bool:
    """Whether a generator is told the captions of the data."""
    return condition.kind == "text" and condition.text.captions == "data"


def check_tokenizer(experiment: Experiment) -> None:
    """Raise ValueError unless the run that run.tokenizer names has what the generators need: tokenizer and codes of
    these images, and their smaller versions or captions where a condition is made of these."""
    run, data = experiment.run, experiment.data
    tokenizer = encoding.borrowed_tokenizer(run, data)
    for split in encoded_splits(experiment):
        shards, images = encoding.open_codes(run, split, tokenizer), open_images(data, split)
        if experiment.diffusion is not None and experiment.diffusion.condition.kind == "image":
            _check_smaller(shards, run.tokenizer)
        if any(_reads_captions(config.condition) for _, config in experiment.generators()):
            _check_captions(shards, images, run.tokenizer)
        changes = difference(shards.meta["images"], images.content())
        if changes:
            told = ", ".join(f"{key} {before!r} -> {after!r}" for key, (before, after) in changes.items())
            raise ValueError(
                f"run.tokenizer={run.tokenizer} has codes of other {split} images than this run's section data names"
                f" ({told}): give it the same data, or leave run.tokenizer out"
            )


def _check_smaller(shards: Shards, other: str | None) -> None:
    """Raise ValueError unless the codes of another run have smaller images beside them."""
    if shards.meta.get("low_resolution") is None:
        command = f"tokenloom encode --config {Path(other or '') / 'config.yaml'} --tokenizer.low_resolution=4"
        raise ValueError(
            f"run.tokenizer={other} has no smaller images, which diffusion.condition.kind=image needs: `{command}` adds"
            " them, for instance"
        )


def _check_captions(shards: Shards, images: ImageSet, other: str | None) -> None:
    """Raise ValueError unless the codes of another run have the captions of these images beside them."""
    if shards.meta.get("captions") != encoding.caption_facts(images).get("captions"):
        command = f"tokenloom encode --config {Path(other or '') / 'config.yaml'} --data.caption_column=..."
        raise ValueError(
            f"run.tokenizer={other} has other captions than this run's section data, or none: `{command}` with the same"
            " column brings them"
        )


def refuse_foreign(experiment: Experiment, command: str) -> None:
    """Raise ValueError where a run takes its tokenizer and codes from another one."""
    other = experiment.run.tokenizer
    if other is not None:
        raise ValueError(
            f"run.tokenizer={other}: this run takes its tokenizer and codes from there, so `tokenloom {command}` has"
            f" nothing to do here; give it --config {Path(other) / 'config.yaml'}, or leave run.tokenizer out"
        )


def train_tokenizer(experiment: Experiment, device: Device) -> None:
    """Stage 1: <run>/tokenizer."""
    refuse_foreign(experiment, "tokenizer")
    with _stage(experiment, device, "tokenizer", "tokenizer/model.json"):
        tokenizing.train_tokenizer(
            run=experiment.run, data=experiment.data, tokenizer=experiment.tokenizer, device=device
        )


def encode(experiment: Experiment, device: Device) -> None:
    """Images to codes and latents, of the splits that are read: <run>/codes."""
    refuse_foreign(experiment, "encode")
    splits = encoded_splits(experiment)
    with _stage(experiment, device, "encode", *(f"codes/{split}/meta.json" for split in splits)):
        encoding.encode_images(
            run=experiment.run, data=experiment.data, tokenizer=experiment.tokenizer, device=device, splits=splits
        )


def train_generator(experiment: Experiment, device: Device, family: str) -> None:
    """Stage 2: <run>/<family>; then the steps of its solver, if diffusion.align asks for them."""
    if experiment.run.tokenizer is not None:
        check_tokenizer(experiment)
    config = dict(experiment.generators())[family]
    with _stage(experiment, device, family, f"{family}/model.json"):
        generating.train_generator(
            run=experiment.run, data=experiment.data, config=config, family=family, device=device
        )
    if isinstance(config, DiffusionConfig) and config.align is not None:
        align(experiment, device)


def align(experiment: Experiment, device: Device) -> Path:
    """Where a solver best stops for the trained diffusion model: <run>/diffusion/steps.json, and a picture of it.

    Raises:
        ValueError: there is no diffusion section, or as `align_steps`.
    """
    if experiment.diffusion is None:
        raise ValueError("steps are those of a diffusion model, and this configuration has no section diffusion")
    from tokenloom.steps_plot import write_steps_plot

    with _stage(experiment, device, "steps", "diffusion/steps.json"):
        path = align_steps(
            run=experiment.run, config=experiment.diffusion, device=device,
            judge=lambda: open_judge(experiment, device),
        )  # fmt: skip
        if device.is_main and _changed_at(path) > _changed_at(path.with_suffix(".png")):
            write_steps_plot(path)
    return path


def draw_samples(experiment: Experiment, device: Device, family: str) -> None:
    """The samples that scores are computed on: <run>/samples/<family>."""
    config = dict(experiment.generators())[family]
    with _stage(experiment, device, f"samples of {family}", f"samples/{family}/samples.json"):
        sampling.sample(
            run=experiment.run, config=config, family=family, device=device, num=experiment.eval.num_samples
        )


def evaluate(experiment: Experiment, device: Device, *, only: str | None = None) -> list[Record]:
    """All scores: <run>/eval/metrics.json."""
    scored = experiment.run.folder / "eval" / "scored.json"
    if device.is_main:
        scored.unlink(missing_ok=True)
    with _stage(experiment, device, "eval", "eval/metrics.json"):
        records = judge.evaluate(
            run=experiment.run, data=experiment.data, tokenizer=experiment.tokenizer, eval=experiment.eval,
            autoregressive=experiment.autoregressive, diffusion=experiment.diffusion, device=device, only=only,
        )  # fmt: skip
    if device.is_main and only is None:
        write_json(scored, _scored_as(experiment))
    return records


def _scored_as(experiment: Experiment) -> dict[str, Any]:
    """What the scores of a run depend on: how they are taken, and of which models."""
    told, run = to_dict(experiment), experiment.run
    homes = {"tokenizer": run.tokenizer_folder, "autoregressive": run.folder, "diffusion": run.folder}
    models = {stage: (_read(home / stage / "model.json") or {}).get("fingerprint") for stage, home in homes.items()}
    sampling = {family: told[family]["sample"] for family, _ in experiment.generators()}
    drawn = samplings(experiment.eval, dict(experiment.generators()))
    special = [each for each in drawn if models[each.family] and names_weights(each.config)]
    models |= {each.subject: drawn_from(run.folder, each.config) for each in special}
    if any(getattr(each.config.sample, "steps", "") == "aligned" for each in drawn):
        aligned = read_aligned(run.folder / "diffusion")
        models |= {"steps": None if aligned is None else list(aligned.stops)}
    return {"eval": told["eval"], "data": told["data"], "sample": sampling, "models": models}


def _is_scored(experiment: Experiment) -> bool:
    """Whether the scores are there as they would be taken now; settings younger than they had their defaults."""
    known = to_dict(Experiment(autoregressive=AutoregressiveConfig(), diffusion=DiffusionConfig()))
    stored = _read(experiment.run.folder / "eval" / "scored.json") or {}
    sample = {family: known[family]["sample"] for family in stored.get("sample", {})}
    return completed(stored, {"eval": known["eval"], "data": known["data"], "sample": sample}) == _scored_as(experiment)


@contextmanager
def _stage(experiment: Experiment, device: Device, name: str, *results: str) -> Iterator[None]:
    """Announces a stage, and keeps its time and the configuration once it has ended well.

    stages.json holds the seconds of the invocation that finished each stage; an older one's are not added.
    """
    folder, begun = experiment.run.folder, time.monotonic()
    before = [_changed_at(folder / result) for result in results]
    yield
    if not device.is_main:
        return
    if [_changed_at(folder / result) for result in results] == before:
        print(f"{name}: done before, nothing to do")
        return
    seconds = time.monotonic() - begun
    print(f"{name}: done in {clock(seconds)}")
    write_atomic(folder / "config.yaml", to_yaml(experiment).encode())
    path = folder / "stages.json"
    stages = _read(path) or {}
    how = {"seconds": round(seconds, 1), "processes": device.world, "precision": device.precision}
    write_json(path, {**stages, name: how})


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def _changed_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
