"""What samples are drawn from: the class, the text or the smaller image of each, as samples.json tells them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config import RunConfig
from engine.images import ImageSet
from engine.shards import Shards
from generator.autoregressive import Autoregressive
from generator.captions import lines_of, prompts_of
from generator.condition import ImageCondition, TextCondition, null_unknown
from generator.diffusion import Diffusion
from generator.smaller import smaller_latents
from tokenizer.encode import open_codes
from tokenizer.model import Tokenizer, load_tokenizer

Generator = Autoregressive | Diffusion


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What one sample after the other is drawn from; candidates beyond the last begin with the first again."""

    labels: list[int]
    """The class of each, -1 where none is known."""
    prompts: list[str] | None = None
    """The text of each, where the generator takes texts."""
    images: Sequence[str | int] | None = None
    """The smaller image of each, where the generator takes such: a number in the test split, or a file and its hash."""
    latents: Tensor | None = None
    """Those of the smaller images, float32 [N, C, h, w]."""

    def told(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """What samples.json tells of these rows."""
        columns = {"labels": self.labels, "prompts": self.prompts, "images": self.images}
        return {key: [values[row % len(values)] for row in rows] for key, values in columns.items() if values}

    def condition(self, rows: Sequence[int]) -> Any:
        """The condition of these rows, as `generator.sample` takes it."""
        places = [row % len(self.labels) for row in rows]
        if self.latents is not None:
            return self.latents[places]
        if self.prompts is not None:
            return [self.prompts[place] for place in places]
        return torch.tensor([self.labels[place] for place in places])


def classes_in_turn(generator: Generator, num: int, label: int | None = None) -> list[int]:
    """Labels of `num` samples: one class, or all in turn; -1 where there are none.

    Raises:
        ValueError: `num` below 1, or a label that the generator does not know.
    """
    if num < 1:
        raise ValueError(f"num={num} must be at least 1")
    turns = [index % generator.num_classes for index in range(num)] if generator.num_classes else [-1] * num
    labels = turns if label is None else [label] * num
    null_unknown(torch.tensor(labels), generator.num_classes)
    return labels


def choose_inputs(
    generator: Generator,
    run: RunConfig,
    *,
    num: int,
    label: int | None = None,
    prompts: Sequence[str] = (),
    images: Sequence[Path] = (),
) -> Inputs:
    """What `num` samples of a run are drawn from.

    Classes take turns, or all are of one label. Texts are the given prompts in turn, or classes in turn in templates
    that training never saw, or captions of the test split. Smaller images are the given files in turn, or those of the
    test split.

    Raises:
        ValueError: a wrong label or number, prompts or images for a generator that takes none, files that do not fit,
            or the test split lacks what is needed.
    """
    _check_kind(generator, prompts=prompts, images=images, label=label)
    test = _TestSplit(run)
    if generator.condition.kind == "text":
        if prompts:
            generator.condition.rows(list(prompts), len(prompts))  # one that does not fit is refused before sampling
            return Inputs(labels=[-1] * num, prompts=[prompts[row % len(prompts)] for row in range(num)])
        labels = classes_in_turn(generator, num, label)
        return Inputs(labels=labels, prompts=_prompts(generator, labels, test))
    if isinstance(generator.condition, ImageCondition):
        if images:
            return _of_files(images, test.tokenizer, num, factor=generator.condition.factor)
        return _of_test_split(generator.condition, test.shards, num)
    return Inputs(labels=classes_in_turn(generator, num, label))


def inputs_of_images(generator: Generator, images: ImageSet) -> Inputs:
    """What the likelihood of each image of a split is given by: its class, or a text of it that training never saw.

    Such a text is its class in one of the held-out templates, or the first line of its own caption.

    Raises:
        ValueError: the generator learned from captions, and the images have none.
    """
    labels = images.labels.tolist() if generator.num_classes else [-1] * len(images)
    if not isinstance(generator.condition, TextCondition):
        return Inputs(labels=labels)
    config = generator.condition.config
    if config.captions == "templates":
        return Inputs(labels=labels, prompts=prompts_of(config, generator.class_names, labels))
    if images.captions is None:
        raise ValueError(
            f"{generator.family} learned from captions, but the {images.split} images have none: set"
            " data.caption_column as in its training"
        )
    return Inputs(labels=labels, prompts=[lines_of(caption)[0] for caption in images.captions])


class _TestSplit:
    """The tokenizer and the test split of a run, opened where they are needed."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run

    @property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.run.tokenizer_folder)

    @property
    def shards(self) -> Shards:
        return open_codes(self.run, "test", self.tokenizer)


def _prompts(generator: Generator, labels: Sequence[int], test: _TestSplit) -> list[str]:
    assert isinstance(generator.condition, TextCondition)
    config = generator.condition.config
    if config.captions == "templates":
        return prompts_of(config, generator.class_names, labels)
    shards = test.shards
    classes = shards.labels.tolist() if generator.num_classes else None
    return prompts_of(config, generator.class_names, labels, shards.captions, classes)


def _of_files(paths: Sequence[Path], tokenizer: Tokenizer, num: int, *, factor: int) -> Inputs:
    """Smaller images of files in turn."""
    turns = [row % len(paths) for row in range(num)]
    latents, names = smaller_latents(tokenizer, paths, factor=factor), [_named(path) for path in paths]
    return Inputs(labels=[-1] * num, images=[names[turn] for turn in turns], latents=latents[turns])


def _of_test_split(condition: ImageCondition, shards: Shards, num: int) -> Inputs:
    """Smaller images of the test split, spread evenly, each once: test sets are often sorted by class.

    Raises:
        ValueError: there are fewer, or they are smaller by another factor than the condition's.
    """
    read = condition.reader(shards)
    if num > len(shards):
        raise ValueError(
            f"num={num} samples are drawn from as many smaller images, but the test split has {len(shards)}: ask for"
            f" {len(shards)} or fewer (eval.num_samples), or give images"
        )
    rows = np.arange(num) * len(shards) // num
    batch = shards.load(rows)
    return Inputs(labels=batch["labels"].tolist(), images=rows.tolist(), latents=read(batch, None))


def _check_kind(generator: Generator, *, prompts: Sequence[str], images: Sequence[Path], label: int | None) -> None:
    kind = generator.condition.kind
    for option, given, wanted in (("--prompt", prompts, "text"), ("--image", images, "image")):
        if given and kind != wanted:
            raise ValueError(
                f"{option} is of a generator with condition.kind={wanted}, but {generator.family} was trained with"
                f" kind={kind}: leave it out, or name the family that takes it with --only"
            )
    if label is not None and (prompts or kind == "image"):
        raise ValueError(f"--label={label} has no effect beside prompts or images: leave it out")


def _named(path: Path) -> str:
    return f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
