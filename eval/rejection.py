"""Rejection sampling: of many candidates of a class, keep those that a classifier takes for it most surely.

As ViT-VQGAN (Yu et al., 2022; second-hand) does with a ResNet-101 and acceptance 0.5 or 0.25. It changes what a score
means, so what is kept carries the acceptance in its name, and the classifier is never the one that judges. But it
learned from the same images as the judging classifier does, so the two err alike: class_accuracy and fd_classifier of
what is kept flatter it. fd_random, whose features learned from no images, is independent of the choice.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.config import RunConfig
from engine.device import Device, exact_products
from engine.images import ImageSet
from engine.log import progress
from eval.classifier import Classifier, train_classifier
from eval.config import ClassifierConfig, check_acceptance
from eval.features import Extractor, weights_hash
from eval.pictures import numbered
from generator.config import AutoregressiveConfig, DiffusionConfig
from generator.inputs import choose_inputs
from generator.sample import open_generator, sample, sample_request
from generator.sample_folder import (
    ROWS,
    Told,
    begins_with,
    check_replaceable,
    draft_of,
    png_path,
    publish,
    read_samples,
    rows_of,
    without_rows,
)
from tokenizer.model import load_tokenizer

BATCH = 128


class Picker(NamedTuple):
    """The classifier that picks, and its fingerprint."""

    network: Classifier
    fingerprint: str


def open_picker(
    config: ClassifierConfig, *, train_set: ImageSet, test_set: ImageSet, run: RunConfig, device: Device
) -> Picker:
    """The classifier of eval.rejection, trained into run.folder/eval/rejection_classifier if it is not there yet.

    Every process of a run must call it.

    Raises:
        ValueError: as `train_classifier`.
    """
    network, card = train_classifier(
        config, train_set=train_set, test_set=test_set, run=run, device=device, name="rejection_classifier"
    )
    return Picker(network, card["fingerprint"])


def check_no_judge(picker: Picker, extractors: Sequence[Extractor]) -> None:
    """Raise ValueError if the picker has the weights of a judge."""
    if weights_hash(picker.network) in {extractor.weights for extractor in extractors}:
        raise ValueError(
            "eval.rejection.classifier has the weights of the classifier that judges, so its scores would be circular: "
            "give another --eval.rejection.classifier.path, or no path and another seed"
        )


def subject_name(family: str, acceptance: float) -> str:
    """What scores call the samples that were kept: autoregressive@accept0.5."""
    return f"{family}@accept{acceptance:g}"


def num_candidates(num: int, acceptance: float) -> int:
    """How many candidates it takes to keep `num`.

    Raises:
        ValueError: an acceptance outside (0, 1).
    """
    check_acceptance("acceptance", acceptance)
    return math.ceil(round(num / acceptance, 6))


def best_of_classes(scores: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """Rows of candidates that are kept, rising: of each class those with the highest scores, of equals the first.

    Args:
        scores: float [M], of each candidate.
        labels: int64 [M], their classes.
        wanted: int64 [N], a class for each one to keep; no class more often than there are candidates of it.
    """
    kept = []
    for label, count in zip(*wanted.unique(return_counts=True), strict=True):
        rows = (labels == label).nonzero().squeeze(1)
        best = scores[rows].argsort(descending=True, stable=True)[: int(count)]
        assert len(best) == count, f"fewer candidates of class {int(label)} than are to be kept"
        kept.append(rows[best])
    return torch.cat(kept).sort().values  # [N]


def sample_accepted(
    *,
    run: RunConfig,
    config: AutoregressiveConfig | DiffusionConfig,
    family: str,
    device: Device,
    picker: Picker,
    acceptance: float,
    out: Path,
    pool: Path,
    num: int = 64,
    label: int | None = None,
    seed: int = 0,
    decoder: str | Path | None = None,
    largest: int = 0,
    **drawing: Any,
) -> Path:
    """Write the best `num` of num / acceptance candidates to `out`, as `generator.sample.sample` writes samples.

    samples.json also tells acceptance, candidates, classifier, and of each image its seed and its `probability`: what
    the classifier gives to the class that was asked. Every class is kept as often as without rejection. The candidates
    stay in `pool`, of which a larger acceptance takes the first; nothing here removes them. Every process of a run
    must call it.

    Args:
        largest: draw at least so many candidates, for smaller acceptances to come.
        label, seed, decoder, drawing: as of `generator.sample.sample`, for the candidates.

    Raises:
        ValueError: as `generator.sample.sample`, or the generator has no classes, or others than the classifier.
    """
    chosen: dict[str, Any] = {"config": config, "num": num, "label": label, "seed": seed}
    wish, image_size = _wish(run, family, decoder, picker, acceptance, chosen)
    there = _is_there(read_samples(out), wish, num)
    device.barrier()  # before any process writes, all have looked
    if there:
        return out
    check_replaceable(out)
    drawing |= {"run": run, "family": family, "device": device, "decoder": decoder}
    sample(out=pool, candidates=max(wish["candidates"], largest), **chosen, **drawing)
    if device.is_main:
        _keep_best(pool, out, wish, num, picker, image_size=image_size, device=device.device)
    device.barrier()
    return out


def check_conditional(generator: Any) -> None:
    """Raise ValueError if a generator has no classes, or restores images, of which each is asked for once."""
    if generator.condition.kind == "image":
        raise ValueError(
            "rejection sampling keeps the best of each class, but this generator restores one image after the other"
            " (diffusion.condition.kind=image): leave the acceptance out"
        )
    if not generator.num_classes:
        raise ValueError(
            f"rejection sampling keeps what a classifier takes for the asked class, but {generator.family} was trained "
            "without classes: leave the acceptance out, or train it on labels with label_dropout below 1"
        )


def _wish(
    run: RunConfig, family: str, decoder: str | Path | None, picker: Picker, acceptance: float, chosen: dict[str, Any]
) -> tuple[Told, int]:
    """samples.json of the candidates with what decides between them, and the side of an image."""
    generator = open_generator(run.folder, chosen["config"])
    tokenizer = load_tokenizer(decoder or run.tokenizer_folder)
    check_conditional(generator)
    mine, theirs = generator.num_classes, picker.network.num_classes
    if mine != theirs:
        raise ValueError(
            f"eval.rejection.classifier knows {theirs} classes, but {family} {mine}: give one of the data that the "
            "generator learned from"
        )
    count = num_candidates(chosen["num"], acceptance)
    inputs = choose_inputs(generator, run, num=chosen["num"], label=chosen["label"])
    how = {key: chosen[key] for key in ("config", "num", "seed")}
    request = sample_request(generator, tokenizer, inputs=inputs, candidates=count, **how)
    facts = {"acceptance": acceptance, "candidates": count, "classifier": picker.fingerprint}
    return {**request, **facts}, tokenizer.image_size


@torch.inference_mode()
def asked_log_probabilities(
    folder: Path, labels: Tensor, network: Classifier, *, image_size: int, device: torch.device
) -> Tensor:
    """log p(asked class | image), float64 [M], of the first M samples in a folder, labels int64 [M]."""
    parts = labels.split(BATCH)
    batches = numbered(folder, len(labels), size=image_size, name="candidates").batches(BATCH)
    found = []
    with exact_products(), progress(total=len(labels), title="rejection", unit="image") as bar:
        for images, asked in zip(batches, parts, strict=True):
            logits = network(images.to(device)).cpu().double()  # [n, K]
            found.append(logits.log_softmax(1).gather(1, asked[:, None]).squeeze(1))
            bar.update(len(asked))
    return torch.cat(found)


def _keep_best(
    pool: Path, out: Path, wish: Told, num: int, picker: Picker, *, image_size: int, device: torch.device
) -> None:
    """Copy the best `num` candidates into `out`, in the order of their seeds."""
    labels = torch.tensor(wish["labels"])  # [M]
    scores = asked_log_probabilities(pool, labels, picker.network, image_size=image_size, device=device)
    rows = best_of_classes(scores, labels, labels[:num]).tolist()
    draft = draft_of(out)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for place, row in enumerate(rows):
        shutil.copyfile(png_path(pool, row), png_path(draft, place))
    told = {**wish, **{key: [wish[key][row] for row in rows] for key in ROWS if key in wish}}
    publish(draft, out, {**told, "probability": [round(math.exp(scores[row]), 6) for row in rows]})


def _is_there(told: Told | None, wish: Told, num: int) -> bool:
    """Whether a folder holds the best `num` of these very candidates."""
    facts = ("acceptance", "candidates", "classifier")
    if told is None or any(told.get(key) != wish[key] for key in facts):
        return False
    drawn = {key: value for key, value in told.items() if key != "acceptance"}
    return (
        begins_with(drawn, without_rows(wish))
        and sorted(told["labels"]) == sorted(wish["labels"][:num])
        and {*rows_of(told)} <= {*rows_of(wish)}
    )
