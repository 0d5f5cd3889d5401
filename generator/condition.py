"""What a generator is told about an image: a class, a text, a smaller version of the image, or nothing (null).

A condition is a tensor whose first dimension is the row: labels int64 [B], token ids int64 [B, L] of a text, or latents
float32 [B, C, h, w] of the smaller image, enlarged again. Networks embed them; sampling and guidance pass them on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.images import ImageSet
from engine.shards import Shards
from generator.captions import Captions, encode_texts
from generator.condition_config import ConditionConfig, TextConfig
from generator.pretrained_text import check_fingerprint

Source = Shards | ImageSet
# (a batch, uniform draws [B] that pick among several texts of an image) -> rows of the condition [B, ...]
Reader = Callable[[Mapping[str, Tensor], Tensor | None], Tensor]


class Condition(Protocol):
    """One kind of condition; what all kinds do alike is written here."""

    kind: str
    guidable: bool
    """Whether it can be compared with no condition."""
    draws: bool
    """Whether its reader uses the draws."""

    def rows(self, given: Any, count: int) -> Tensor:
        """`count` rows for sampling, checked; null where None is given.

        Raises:
            ValueError: another number of rows, or rows that do not fit.
        """

    def null(self, count: int) -> Tensor:
        """Rows that stand for no condition."""

    def reader(self, source: Source) -> Reader:
        """What finds the rows of training batches from a source.

        Raises:
            ValueError: the source lacks what the condition is made of.
        """

    def drop(self, rows: Tensor, dropped: Tensor) -> Tensor:
        """Rows [B, ...] with null where `dropped`, boolean [B]."""
        null = self.null(1).to(rows.device)  # [1, ...]
        return torch.where(dropped.reshape(-1, *(1,) * (rows.ndim - 1)), null, rows)


class ClassCondition(Condition):
    """A label in 0 .. num_classes - 1; num_classes is null. Without classes every label is null."""

    kind, draws = "class", False

    def __init__(self, num_classes: int) -> None:
        self.num_classes, self.guidable = num_classes, num_classes > 0

    def rows(self, given: Tensor | None, count: int) -> Tensor:
        """Labels int64 [count]; -1 is null."""
        return label_rows(given, count, self.num_classes)

    def null(self, count: int) -> Tensor:
        return torch.full((count,), self.num_classes)

    def reader(self, source: Source) -> Reader:
        def read(batch: Mapping[str, Tensor], draws: Tensor | None = None) -> Tensor:
            return training_labels(batch["labels"], self.num_classes)

        return read


class TextCondition(Condition):
    """A text as token ids [L]; those of the empty text are null."""

    kind, draws, guidable = "text", True, True

    def __init__(self, config: TextConfig, class_names: Sequence[str]) -> None:
        self.config, self.class_names = config, tuple(class_names)

    def rows(self, given: Tensor | Sequence[str] | None, count: int) -> Tensor:
        """Token ids int64 [count, L], of texts or of ids themselves."""
        if given is None:
            return self.null(count)
        if not isinstance(given, Tensor):
            # Captions of the data are cut in training too; of a prompt in the manner of the templates nothing is lost.
            given = encode_texts(self.config, list(given), whole=self.config.captions == "templates")
        if len(given) != count:
            raise ValueError(f"{len(given)} texts for {count} samples: give one prompt for each")
        if given.ndim != 2 or given.shape[1] != self.config.length:
            raise ValueError(
                f"a condition of shape {list(given.shape)} does not fit this generator, which takes texts, or their"
                f" ids [B, {self.config.length}]: give prompts"
            )
        return given

    def null(self, count: int) -> Tensor:
        return self._empty.expand(count, -1)

    @functools.cached_property
    def _empty(self) -> Tensor:
        return encode_texts(self.config, [""])  # [1, L]

    def reader(self, source: Source) -> Reader:
        return Captions(self.config, self.class_names, source)


class ImageCondition(Condition):
    """Latents [C, h, w] of the image made smaller by a factor, and enlarged again; zeros are null."""

    kind, draws, guidable = "image", False, True

    def __init__(self, latent_shape: Sequence[int], factor: int = 0) -> None:
        """A factor of 0 is not known yet: of a generator that is only imagined."""
        self.latent_shape, self.factor = tuple(latent_shape), factor

    def rows(self, given: Tensor | None, count: int) -> Tensor:
        """Latents float32 [count, C, h, w]."""
        given = self.null(count) if given is None else given
        if tuple(given.shape) != (count, *self.latent_shape):
            wanted = ", ".join(map(str, (count, *self.latent_shape)))
            raise ValueError(
                f"a condition of shape {list(given.shape)} does not fit this generator, which takes the latents"
                f" [{wanted}] of smaller images: give images"
            )
        return given

    def null(self, count: int) -> Tensor:
        return torch.zeros(count, *self.latent_shape)

    def reader(self, source: Source) -> Reader:
        if isinstance(source, ImageSet) or not source.meta.get("low_resolution"):
            raise ValueError(
                "condition.kind=image needs the smaller images of the data beside their latents: set"
                " tokenizer.low_resolution, to 4 for instance, and run `tokenloom encode` again"
            )
        if self.factor not in (0, source.meta["low_resolution"]):
            raise ValueError(
                f"{source.folder} has smaller images of 1/{source.meta['low_resolution']} of the side, but this"
                f" generator learned from 1/{self.factor}: set tokenizer.low_resolution={self.factor} and run"
                " `tokenloom encode` again"
            )

        def read(batch: Mapping[str, Tensor], draws: Tensor | None = None) -> Tensor:
            return batch["smaller"].float()

        return read


def build_condition(config: ConditionConfig, card: Mapping[str, Any]) -> Condition:
    """The condition of a generator whose card names its classes and latents."""
    if config.kind == "text":
        check_fingerprint(config.text, card.get("text_fingerprint"))
        return TextCondition(config.text, card["class_names"])
    if config.kind == "image":
        return ImageCondition(card["latent_shape"], card.get("low_resolution", 0))
    return ClassCondition(card["num_classes"])


def condition_of(card: Mapping[str, Any]) -> Condition:
    """The condition of the generator of a card; one that is older than conditions knows classes."""
    return build_condition(condition_config(card), card)


def condition_config(card: Mapping[str, Any]) -> ConditionConfig:
    """The section `condition` that a card tells."""
    told = dict(card.get("config", {}).get("condition", {}))
    text = dict(told.pop("text", {}))
    for key in ("templates", "held_out"):
        if key in text:
            text[key] = tuple(text[key])
    if "names" in text:
        text["names"] = tuple(tuple(words) for words in text["names"])
    return ConditionConfig(**told, text=TextConfig(**text))


# Labels


def null_unknown(labels: Tensor, num_classes: int) -> Tensor:
    """Labels with -1 (none known) replaced by the null label `num_classes`.

    Raises:
        ValueError: a label outside -1 .. num_classes - 1.
    """
    wrong = labels[(labels < -1) | (labels >= num_classes)]
    if len(wrong):
        allowed = f"0 .. {num_classes - 1}, or -1 for none" if num_classes else "-1: the generator knows no classes"
        raise ValueError(f"label {int(wrong[0])} must be {allowed}")
    return torch.where(labels < 0, num_classes, labels)


def label_rows(labels: Tensor | None, rows: int, num_classes: int) -> Tensor:
    """One label for each of `rows` samples, int64 [rows], null where none is given.

    Raises:
        ValueError: a number of labels other than `rows`, or one out of range.
    """
    labels = torch.full((rows,), -1) if labels is None else labels
    if len(labels) != rows:
        raise ValueError(f"{len(labels)} labels for {rows} samples: give one label for each")
    return null_unknown(labels, num_classes)


def training_labels(labels: Tensor, num_classes: int) -> Tensor:
    """As `null_unknown`, but a network without classes takes every label for null; does not wait for the device."""
    return torch.where((labels < 0) | (num_classes == 0), num_classes, labels)


def spread_labels(num: int, num_classes: int) -> Tensor:
    """Labels int64 [num] in rising order, spread evenly over the classes; -1 where there are none."""
    if num_classes == 0:
        return torch.full((num,), -1)
    return torch.arange(num) * num_classes // num


def preview_rows(condition: Condition, read: Reader, shards: Shards, num: int) -> Tensor:
    """Rows of a condition for `num` previews: labels sorted by class, or what is told about evenly spread images."""
    if isinstance(condition, ClassCondition):
        return spread_labels(num, condition.num_classes)
    return read(shards.load(np.arange(num) * len(shards) // num), None)


def check_guidance(family: str, guidance: float, *, guidable: bool, label_dropout: float) -> None:
    """Guidance compares a condition with none; raise ValueError unless the network learned both, or guidance is 1."""
    if guidance != 1 and not (guidable and label_dropout):
        raise ValueError(
            f"{family}.sample.guidance={guidance} compares a condition with none, but this generator learned only one"
            f" of them: use guidance=1, or train on classes, texts or images with {family}.model.label_dropout above 0"
        )
