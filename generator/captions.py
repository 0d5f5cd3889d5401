"""Which texts the rows of training have, and which ones samples are scored on; texts as rows of token ids.

A caption of the data set has one text in each line. A template makes one text of each word for a class; training draws
from `templates`, scores from `held_out` alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from generator.condition_config import TextConfig, class_words, plain
from generator.pretrained_text import token_ids

VARIANTS = 32  # versions of each template with other words in it; the first is the template itself
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Captioned(Protocol):
    """A data set with texts: `ImageSet` and `Shards` are such."""

    @property
    def captions(self) -> list[str] | None: ...


def encode_texts(config: TextConfig, texts: Sequence[str], *, whole: bool = False) -> Tensor:
    """Texts -> token ids int64 [B, L]. 0 is padding; the last of a row is always 0, the place of the summary.

    For encoder=bytes, id b + 1 is byte b of the text in UTF-8, lower case and single blanks; the others have ids of
    their own tokenizer, plus 1. What does not fit is cut off, at a character.

    Args:
        whole: refuse texts that do not fit.

    Raises:
        ValueError: with `whole`, a text of more than L - 1 tokens; or the tokenizer of a frozen encoder is missing.
    """
    if config.encoder == "bytes":
        rows = [[byte + 1 for byte in plain(text).encode()] for text in texts]
    else:
        rows = [[token + 1 for token in row] for row in token_ids(config, texts, whole=whole)]
    ids = torch.zeros(len(rows), config.length, dtype=torch.int64)
    for place, (row, text) in enumerate(zip(rows, texts, strict=True)):
        if whole and len(row) > config.length - 1:
            raise ValueError(
                f"{text!r} has {len(row)} tokens, but condition.text.length={config.length} leaves room for"
                f" {config.length - 1}: shorten it, or train with a greater length"
            )
        kept = _cut(row, config.length - 1) if config.encoder == "bytes" else row[: config.length - 1]
        ids[place, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
    return ids


class Captions:
    """Rows of training batches -> ids of one of their texts, by tables on the batch's device.

    Raises:
        ValueError: the source has no captions where they are asked for, or there are no classes to name; a text of a
            template does not fit.
    """

    def __init__(self, config: TextConfig, class_names: Sequence[str], source: Captioned) -> None:
        self.by = "labels" if config.captions == "templates" else "rows"
        if self.by == "labels":
            texts = _of_templates(config, class_names)
        else:
            texts = [lines_of(caption) for caption in _captions_of(source)]
        # The last entry is that of rows of unknown class, whose label is -1.
        self._build(config, [*texts, [""]])

    def _build(self, config: TextConfig, texts: list[list[str]]) -> None:
        """Tables of the distinct texts [N, L], and of each entry's texts: its first place in a list, and how many."""
        distinct = {text: number for number, text in enumerate(dict.fromkeys(_flat(texts)))}
        whole = config.captions == "templates"
        ids = encode_texts(config, list(distinct), whole=whole).to(torch.int32)  # [N, L]
        listed = torch.tensor([distinct[text] for text in _flat(texts)])
        counts = torch.tensor([len(each) for each in texts])
        self._tables = [ids, listed, counts.cumsum(0) - counts, counts]

    def __call__(self, batch: Mapping[str, Tensor], draws: Tensor | None = None) -> Tensor:
        """Ids int64 [B, L] for the rows of a batch; the draws [B] in [0, 1) pick one text of each, 0 the first."""
        entry = batch[self.by]  # [B]
        ids, listed, first, counts = self._tables = [table.to(entry.device) for table in self._tables]
        count = counts[entry]
        turn = torch.zeros_like(entry) if draws is None else (draws * count).long().clamp(max=count - 1)
        return ids[listed[first[entry] + turn]].long()


def prompts_of(
    config: TextConfig,
    class_names: Sequence[str],
    labels: Sequence[int],
    captions: Sequence[str] | None = None,
    caption_labels: Sequence[int] | None = None,
) -> list[str]:
    """Texts for samples of these labels: held-out templates and words in turn, or captions of the test split in turn.

    Templates and words change when the classes have come round: sample k has turn k // num_classes.

    Args:
        captions: those of the test split, for captions=data; the first line of each is used.
        caption_labels: their labels; samples of a known class then have captions of this class. Labels of -1 have any.

    Raises:
        ValueError: captions=data without captions, or none of a label; no classes to name.
    """
    if config.captions == "data":
        return _captions_in_turn(labels, captions, caption_labels)
    words = class_words(config, class_names)
    prompts = []
    for place, label in enumerate(labels):
        turn = place // len(words)
        template = config.held_out[turn % len(config.held_out)]
        chosen = words[label][turn // len(config.held_out) % len(words[label])] if label >= 0 else None
        prompts.append("" if chosen is None else template.replace("{}", chosen))
    return prompts


def lines_of(caption: str) -> list[str]:
    """The texts of a caption, one in each line that is not blank; the empty text where there is none."""
    return [line.strip() for line in caption.splitlines() if line.strip()] or [""]


def varied(template: str, rate: float, count: int) -> list[str]:
    """The template, and versions of it in which each other word than {} is changed with probability `rate`: it is left
    out, or random letters stand for it, as many.

    The same for the same template, wherever it stands.
    """
    if rate == 0:
        return [template]
    chance = random.Random(template)

    def other(word: str) -> str:
        if "{}" in word or chance.random() >= rate:
            return word
        return "".join(chance.choices(LETTERS, k=len(word))) if chance.random() < 0.5 else ""

    return [template, *(plain(" ".join(map(other, template.split()))) for _ in range(count - 1))]


def _of_templates(config: TextConfig, class_names: Sequence[str]) -> list[list[str]]:
    versions = _flat(varied(each, config.varied_words, VARIANTS) for each in config.templates)
    named = class_words(config, class_names)
    return [[text.replace("{}", word) for text in versions for word in words] for words in named]


def _captions_of(source: Captioned) -> list[str]:
    if source.captions is None:
        raise ValueError(
            "condition.text.captions=data, but the data set has no captions: name their column in data.caption_column"
            " and run `tokenloom encode` again, or use captions=templates"
        )
    return source.captions


def _captions_in_turn(
    labels: Sequence[int], captions: Sequence[str] | None, caption_labels: Sequence[int] | None
) -> list[str]:
    if not captions:
        raise ValueError(
            "condition.text.captions=data, but the test split has no captions to draw samples from: give prompts, or"
            " name the column in data.caption_column and run `tokenloom encode` again"
        )
    members: dict[int, list[str]] = {-1: list(captions)}
    for caption, label in zip(captions, caption_labels if caption_labels is not None else (), strict=False):
        members.setdefault(int(label), []).append(caption)
    turns, prompts = dict.fromkeys(members, 0), []
    for label in labels:
        key = label if caption_labels is not None else -1
        if key not in members:
            raise ValueError(f"label {label}: no image of this class in the test split has a caption; give prompts")
        prompts.append(lines_of(members[key][turns[key] % len(members[key])])[0])
        turns[key] += 1
    return prompts


def _flat(groups: Iterable[list[str]]) -> list[str]:
    return [text for group in groups for text in group]


def _cut(row: list[int], room: int) -> list[int]:
    """The first ids of bytes, without a beginning of a character of which the rest does not fit."""
    if len(row) > room:
        while room and 0x80 <= row[room] - 1 < 0xC0:  # a byte that continues a character
            room -= 1
    return row[:room]
