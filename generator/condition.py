"""What a generator is told about an image: a class, or nothing (the null label, one past the last class)."""

from __future__ import annotations

import torch
from torch import Tensor


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


def check_guidance(family: str, guidance: float, *, num_classes: int, label_dropout: float) -> None:
    """Guidance compares a class with none; raise ValueError unless the network learned both, or guidance is 1."""
    if guidance != 1 and not (num_classes and label_dropout):
        raise ValueError(
            f"{family}.sample.guidance={guidance} compares a class with none, but this generator learned only one of"
            f" them: use guidance=1, or train on labels with {family}.model.label_dropout above 0"
        )
