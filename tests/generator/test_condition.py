"""What a generator is told: rows for sampling, null rows, rows of training batches."""

from typing import Any

import numpy as np
import pytest
import torch

from generator.captions import encode_texts
from generator.condition import ClassCondition, ImageCondition, TextCondition, condition_config, condition_of
from generator.condition_config import ConditionConfig, TextConfig

TEXT = TextConfig(length=12)
NAMES = ("cat", "dog")
SHAPE = (2, 4, 4)
KINDS = [ClassCondition(3), TextCondition(TEXT, NAMES), ImageCondition(SHAPE)]


@pytest.mark.parametrize("condition", KINDS, ids=lambda each: each.kind)
def test_no_condition_is_null_rows(condition: Any) -> None:
    null = condition.null(4)
    assert len(null) == 4
    assert torch.equal(condition.rows(None, 4), null)
    assert torch.equal(condition.null(1).expand_as(null), null)


@pytest.mark.parametrize(
    ("condition", "given"),
    [
        (KINDS[0], torch.tensor([0, 2, 1])),
        (KINDS[1], encode_texts(TEXT, ["a cat", "dog", "cat"])),
        (KINDS[2], torch.randn(3, *SHAPE)),
    ],
    ids=["class", "text", "image"],
)
def test_dropping_puts_null_rows_in_the_place_of_those_and_leaves_the_others(condition: Any, given: Any) -> None:
    rows = condition.rows(given, 3)
    dropped = condition.drop(rows, torch.tensor([True, False, True]))
    assert torch.equal(dropped[1], rows[1])
    assert torch.equal(dropped[0], condition.null(1)[0]) and torch.equal(dropped[2], condition.null(1)[0])
    assert not torch.equal(dropped[0], rows[0])


def test_texts_and_their_ids_are_the_same_rows() -> None:
    words = ["a cat", "dog"]
    assert torch.equal(KINDS[1].rows(words, 2), KINDS[1].rows(encode_texts(TEXT, words), 2))
    assert torch.equal(KINDS[1].rows(["", "dog"], 2)[0], KINDS[1].null(1)[0])


@pytest.mark.parametrize(
    ("condition", "given", "told"),
    [
        (KINDS[0], torch.tensor([0, 3]), "label 3 must be 0 .. 2"),
        (KINDS[0], torch.tensor([0]), "1 labels for 2 samples"),
        (ClassCondition(0), torch.tensor([0, 0]), "the generator knows no classes"),
        (KINDS[1], ["cat"], "1 texts for 2 samples"),
        (KINDS[1], torch.zeros(2, 5, dtype=torch.int64), r"shape \[2, 5\] does not fit .* \[B, 12\]"),
        (KINDS[2], torch.zeros(2, 3, 4, 4), r"shape \[2, 3, 4, 4\] does not fit .* \[2, 2, 4, 4\]"),
    ],
)
def test_rows_that_do_not_fit_are_refused(condition: Any, given: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        condition.rows(given, 2)


def test_training_labels_that_are_unknown_are_null() -> None:
    batch = {"labels": torch.tensor([1, -1, 2])}
    assert ClassCondition(3).reader(None)(batch, None).tolist() == [1, 3, 2]  # type: ignore[arg-type]
    assert ClassCondition(0).reader(None)(batch, None).tolist() == [0, 0, 0]  # type: ignore[arg-type]


def test_an_old_card_knows_classes() -> None:
    card = {"config": {"model": {}}, "num_classes": 5, "class_names": list("abcde"), "latent_shape": [4, 2, 2]}
    assert condition_config(card) == ConditionConfig()
    condition = condition_of(card)
    assert condition.kind == "class" and condition.null(1).item() == 5


def test_a_card_tells_its_condition_as_json_does() -> None:
    text = {"templates": ["a {}", "{}"], "held_out": ["the {}"], "names": [["one", "1"], ["two"]], "length": 9}
    card = {"config": {"condition": {"kind": "text", "text": text}}, "num_classes": 2, "class_names": ["1", "2"]}
    condition = condition_of(card)
    assert isinstance(condition, TextCondition)
    assert condition.config.names == (("one", "1"), ("two",)) and condition.config.templates == ("a {}", "{}")
    assert condition.null(2).shape == (2, 9)


def test_smaller_images_that_are_not_there_are_asked_for() -> None:
    class Plain:
        def __init__(self, **meta: Any) -> None:
            self.meta = meta

    with pytest.raises(ValueError, match=r"set tokenizer\.low_resolution"):
        KINDS[2].reader(Plain())
    found = torch.from_numpy(np.ones((2, *SHAPE), np.float16))
    assert KINDS[2].reader(Plain(low_resolution=4))({"smaller": found}, None).dtype == torch.float32
