"""What a generator is told about an image, as the section `condition` of a family says it. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from generator.checks import check_at_least, check_choices, check_finite

# Keys of a text and the choice that reads them; the others are read by all.
OF_ENCODER: dict[str, tuple[str, ...]] = {
    "stride": ("bytes",), "depth": ("bytes",), "width": ("bytes",), "path": ("clip", "t5"),
}  # fmt: skip
OF_CAPTIONS: dict[str, tuple[str, ...]] = {
    "templates": ("templates",), "held_out": ("templates",), "names": ("templates",), "varied_words": ("templates",),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    encoder: Literal["bytes", "clip", "t5"] = "bytes"
    """What turns a text into tokens: a small transformer over its bytes, trained along; or a frozen CLIP or T5 text
    encoder of `path`."""
    path: str | None = None
    """Folder of a CLIP or T5 in transformers' layout, or its name on the hub."""
    length: int = 64
    """Tokens of a text, bytes for encoder=bytes, and one for its summary; longer captions are cut, shorter ones
    padded."""
    stride: int = 4
    """Bytes that the transformer over bytes makes one token of."""
    depth: int = 2
    """Blocks of the transformer over bytes."""
    width: int = 128
    """Its channels, whatever the width of the network that reads the text: a wider one, trained at the network's rate,
    may fall silent before its words are of use."""
    captions: Literal["templates", "data"] = "templates"
    """Where the texts of training come from: class names in templates, or the captions of the data set
    (data.caption_column), of which each line is one text."""
    templates: tuple[str, ...] = (
        "{}", "a {}", "a photo of a {}", "an image of the {}", "a picture of one {}", "this is a {}", "a {} in a photo",
        "the {} that was asked for",
    )  # fmt: skip
    """Texts with {} in the place of the class name; one is drawn for each image at each step."""
    held_out: tuple[str, ...] = ("here we see a {}", "a picture of the {}", "one {} as an example", "the photo of a {}")
    """Templates that no training sees: the scored samples are drawn from them."""
    names: tuple[tuple[str, ...], ...] = ()
    """Words for each class, in the order of the classes, to use in turn for its name; absent: the data set's names."""
    varied_words: float = 0.0
    """Share of the other words of a template that training leaves out, or writes in random letters, as if they were
    words that it does not know: held-out templates are then understood more often."""

    def __post_init__(self) -> None:
        check_choices("condition.text", self)
        check_finite("condition.text", self)
        check_at_least("condition.text.length", self.length, 2)
        for name in ("stride", "depth", "width"):
            check_at_least(f"condition.text.{name}", getattr(self, name), 1)
        if not 0 <= self.varied_words < 1:
            raise ValueError(f"condition.text.varied_words={self.varied_words} must lie in [0, 1)")
        self._refuse_idle_keys()
        if self.encoder != "bytes" and not self.path:
            raise ValueError(
                f"condition.text.path={self.path}: encoder={self.encoder} needs the folder of a"
                f" {self.encoder.upper()}, or its name on the hub; encoder=bytes needs no weights"
            )
        if self.captions == "templates":
            self._check_templates()

    def _refuse_idle_keys(self) -> None:
        standard = {each.name: each.default for each in fields(self)}
        for table, choice in ((OF_ENCODER, "encoder"), (OF_CAPTIONS, "captions")):
            for key, readers in table.items():
                if getattr(self, choice) not in readers and getattr(self, key) != standard[key]:
                    raise ValueError(
                        f"condition.text.{key}={getattr(self, key)} has no effect with"
                        f" {choice}={getattr(self, choice)}: leave it out, or choose {choice}={' or '.join(readers)}"
                    )

    def _check_templates(self) -> None:
        for key in ("templates", "held_out"):
            texts = getattr(self, key)
            if not texts:
                raise ValueError(f"condition.text.{key}=[]: give at least one text with {{}} for the class name")
            for text in texts:
                if text.count("{}") != 1:
                    raise ValueError(
                        f"condition.text.{key}: {text!r} must have {{}} once, in the place of the class name"
                    )
        seen = {plain(text) for text in self.templates}
        shared = next((text for text in self.held_out if plain(text) in seen), None)
        if shared is not None:
            raise ValueError(f"condition.text.held_out: {shared!r} is in templates too, so training sees it: reword it")
        for number, words in enumerate(self.names):
            if not words or not all(plain(word) for word in words):
                raise ValueError(
                    f"condition.text.names: class {number} has {list(words)}: give each class at least one word"
                )


@dataclass(frozen=True, kw_only=True)
class ConditionConfig:
    kind: Literal["class", "text", "image"] = "class"
    """What the generator is told: a class (or nothing where there are none), a text, or a smaller version of the image
    (tokenizer.low_resolution)."""
    text: TextConfig = field(default_factory=TextConfig)
    """Texts and their encoder, for kind=text."""

    def __post_init__(self) -> None:
        check_choices("condition", self)
        if self.kind != "text" and self.text != TextConfig():
            key = next(each.name for each in fields(self.text) if getattr(self.text, each.name) != each.default)
            raise ValueError(
                f"condition.text.{key}={getattr(self.text, key)} has no effect with kind={self.kind}: leave it out, or"
                " choose kind=text"
            )


@dataclass(frozen=True, kw_only=True)
class CodesConditionConfig(ConditionConfig):
    """That of a family whose codes stand beside no image."""

    kind: Literal["class", "text"] = "class"
    """What the generator is told: a class (or nothing where there are none), or a text."""


def plain(text: str) -> str:
    """A text in lower case, its words one blank apart: what the encoder over bytes reads."""
    return " ".join(text.lower().split())


def class_words(config: TextConfig, class_names: Sequence[str]) -> list[tuple[str, ...]]:
    """The words for each class: those of `names`, or the data set's name with blanks for underscores.

    Raises:
        ValueError: there are no classes, or `names` names another number of them.
    """
    if not class_names:
        raise ValueError(
            "condition.text.captions=templates puts class names into templates, but the generator knows no classes: use"
            " data with classes and label_dropout below 1, or captions=data with data.caption_column"
        )
    if config.names and len(config.names) != len(class_names):
        raise ValueError(
            f"condition.text.names has words for {len(config.names)} classes, but there are {len(class_names)}"
            f" ({', '.join(class_names[:3])}, ...): give words for each of them, in their order"
        )
    return list(config.names) or [(name.replace("_", " "),) for name in class_names]
