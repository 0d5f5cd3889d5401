"""Which texts training draws, which ones samples are scored on, and how texts become ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import to_dict
from generator.captions import VARIANTS, Captions, encode_texts, lines_of, prompts_of, varied
from generator.condition import condition_config
from generator.condition_config import ConditionConfig, TextConfig, class_words, plain

CLASSES = ("tree_frog", "cat")


class Source:
    """A data set with these captions."""

    def __init__(self, captions: list[str] | None = None) -> None:
        self.captions = captions


def text_of(row: Tensor) -> str:
    """What the ids of bytes say."""
    return bytes(int(value) - 1 for value in row if value > 0).decode()


def config(**given: Any) -> TextConfig:
    standard: dict[str, Any] = {"templates": ("a {}", "the {} here"), "held_out": ("one {}", "{} again"), "length": 24}
    return TextConfig(**{**standard, **given})


def drawn(captions: Captions, batch: dict[str, Any], draws: Sequence[float] | None = None) -> list[str]:
    tensors = {key: torch.tensor(value) for key, value in batch.items()}
    ids = captions(tensors, None if draws is None else torch.tensor(draws))
    assert ids.dtype == torch.int64 and ids.ndim == 2
    return [text_of(row) for row in ids]


def test_bytes_count_from_one_behind_them_padding() -> None:
    ids = encode_texts(config(length=6), ["Ab", "", " \t"])
    assert ids.tolist() == [[98, 99, 0, 0, 0, 0], [0] * 6, [0] * 6]


def test_writing_decides_nothing() -> None:
    assert plain("  A  Photo\nof ") == "a photo of"
    ids = encode_texts(config(), ["A  Photo of", "a photo of "])
    assert ids[0].equal(ids[1])


def test_every_byte_has_an_id_and_the_last_place_is_the_summarys() -> None:
    ids = encode_texts(config(length=6), ["abcdefgh"])
    assert text_of(ids[0]) == "abcde" and ids[0, -1] == 0


@pytest.mark.parametrize(("length", "kept"), [(4, "ab"), (5, "abé"), (6, "abé"), (7, "abé"), (8, "abé€")])
def test_a_text_is_cut_at_a_character(length: int, kept: str) -> None:
    """é has two bytes, € three."""
    assert text_of(encode_texts(config(length=length), ["abé€"])[0]) == kept


def test_a_whole_text_that_does_not_fit_is_refused() -> None:
    encode_texts(config(length=6), ["12345"], whole=True)
    with pytest.raises(ValueError, match=r"'123456' has 6 tokens, but condition\.text\.length=6 .* 5: shorten"):
        encode_texts(config(length=6), ["123456"], whole=True)


def test_each_class_has_each_template_with_each_word_equally_often() -> None:
    captions = Captions(config(names=(("frog", "toad"), ("cat",))), CLASSES, Source())
    draws = [(k + 0.5) / 8 for k in range(8)]
    frogs = ["a frog", "a toad", "the frog here", "the toad here"]
    assert drawn(captions, {"labels": [0] * 8}, draws) == [text for text in frogs for _ in range(2)]
    assert drawn(captions, {"labels": [1] * 8}, draws) == ["a cat"] * 4 + ["the cat here"] * 4


def test_the_data_sets_names_lose_their_underscores_and_unknown_classes_have_no_text() -> None:
    captions = Captions(config(), CLASSES, Source())
    assert drawn(captions, {"labels": [0, -1, 1]}, [0.99999, 0.99999, 0.0]) == ["the tree frog here", "", "a cat"]
    assert drawn(captions, {"labels": [1, 0]}) == ["a cat", "a tree frog"]


def test_a_draw_next_to_one_stays_in_its_list() -> None:
    """In float32 a draw below 1 times a large count can round up to the count."""
    lines = "\n".join(f"text {number}" for number in range(1000))
    captions = Captions(config(captions="data", **NO_TEMPLATES), (), Source(["first", lines, "last"]))
    assert drawn(captions, {"rows": [1]}, [1 - 2**-24]) == ["text 999"]


NO_TEMPLATES = {key: TextConfig.__dataclass_fields__[key].default for key in ("templates", "held_out")}


def test_captions_of_the_data_are_drawn_line_by_line() -> None:
    captions = Captions(config(captions="data", **NO_TEMPLATES), (), Source(["One\n\ntwo ", "", "one"]))
    batch = {"rows": [0, 0, 0, 1, 2], "labels": [-1] * 5}
    assert drawn(captions, batch, [0.0, 0.49, 0.5, 0.7, 0.7]) == ["one", "one", "two", "", "one"]
    assert lines_of("\n") == [""]


def test_captions_that_are_not_there_are_asked_for() -> None:
    for texts in (config(captions="data", **NO_TEMPLATES),):
        with pytest.raises(ValueError, match=r"captions=data, .* name their column in data\.caption_column"):
            Captions(texts, CLASSES, Source())
        with pytest.raises(ValueError, match=r"captions=data, but the test split .* data\.caption_column"):
            prompts_of(texts, CLASSES, [0])


def test_a_template_must_fit_with_its_longest_word() -> None:
    with pytest.raises(ValueError, match=r"'the tree frog here' has 18 tokens, but condition\.text\.length=18"):
        Captions(config(length=18), CLASSES, Source())


def test_words_are_left_out_or_made_up_but_never_the_class() -> None:
    kept = varied("one small {} on black", 0.5, 400)
    assert kept[0] == "one small {} on black" and len(kept) == 400 and all("{}" in text for text in kept)
    assert kept == varied("one small {} on black", 0.5, 400)
    stays = torch.tensor([[word in text.split() for word in ("one", "small", "on", "black")] for text in kept[1:]])
    assert (stays.float().mean(0) - 0.5).abs().max() < 0.1  # four deviations of 399 draws
    counts = torch.tensor([len(text.split()) - 1 for text in kept[1:]]).float()
    assert abs(counts.mean() - 3) < 0.2, "half of the changed words are left out"
    assert max(map(len, kept)) == len(kept[0]), "and the others are as long as they were"
    assert varied("a {}", 0.0, 200) == ["a {}"]


def test_training_sees_other_wordings_and_scores_do_not() -> None:
    texts = config(varied_words=0.5)
    captions = Captions(texts, CLASSES, Source())
    draws = [(k + 0.5) / (2 * VARIANTS) for k in range(2 * VARIANTS)]
    seen = drawn(captions, {"labels": [1] * len(draws)}, draws)
    assert {"a cat", "cat", "the cat here", "cat here", "the cat"} < set(seen)
    assert all("cat" in text.split() and len(text) <= len("the cat here") for text in seen)
    assert prompts_of(texts, CLASSES, [1]) == ["one cat"]


def test_prompts_are_of_the_held_out_templates_alone_and_use_all_of_them_and_all_words() -> None:
    texts = config(names=(("frog", "toad"), ("cat",)))
    prompts = prompts_of(texts, CLASSES, [0, 1] * 4)
    assert prompts == [
        "one frog",
        "one cat",
        "frog again",
        "cat again",
        "one toad",
        "one cat",
        "toad again",
        "cat again",
    ]
    assert prompts_of(texts, CLASSES, [0] * 16)[::2] == ["one frog", "frog again", "one toad", "toad again"] * 2
    assert prompts_of(texts, CLASSES, [-1]) == [""]


def test_prompts_from_captions_are_of_the_class_that_is_asked() -> None:
    texts, captions = config(captions="data", **NO_TEMPLATES), ["A frog\ntoad", "cat", "the frog"]
    assert prompts_of(texts, (), [-1] * 4, captions) == ["A frog", "cat", "the frog", "A frog"]
    of_class = prompts_of(texts, CLASSES, [0, 1, 0, 1, -1], captions, [0, 1, 0])
    assert of_class == ["A frog", "cat", "the frog", "cat", "A frog"]
    with pytest.raises(ValueError, match="label 1: no image of this class"):
        prompts_of(texts, CLASSES, [1], captions, [0, 0, 0])


def test_names_must_fit_the_classes() -> None:
    with pytest.raises(ValueError, match=r"names has words for 1 classes, but there are 2 \(tree_frog, cat"):
        class_words(config(names=(("frog",),)), CLASSES)
    with pytest.raises(ValueError, match=r"the generator knows no classes: .* captions=data"):
        Captions(config(), (), Source())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"templates": ("a photo",)}, r"condition\.text\.templates: 'a photo' must have \{\} once"),
        ({"held_out": ("{} and {}",)}, r"condition\.text\.held_out: '\{\} and \{\}' must have \{\} once"),
        ({"templates": ()}, r"condition\.text\.templates=\[\]"),
        ({"held_out": ()}, r"condition\.text\.held_out=\[\]"),
        ({"held_out": ("one {}", " The  {} here")}, r"held_out: ' The  \{\} here' is in templates too"),
        ({"names": (("frog",), ())}, r"names: class 1 has \[\]"),
        ({"names": ((" ",),)}, r"names: class 0 has \[' '\]"),
        ({"varied_words": 1.0}, r"varied_words=1.0 must lie in \[0, 1\)"),
        ({"length": 1}, r"condition\.text\.length=1 must be at least 2"),
        ({"depth": 0}, r"condition\.text\.depth=0 must be at least 1"),
        ({"encoder": "words"}, r"condition\.text\.encoder='words' must be one of bytes, clip, t5"),
        ({"path": "clip"}, r"condition\.text\.path=clip has no effect with encoder=bytes: .* encoder=clip or t5"),
        ({"encoder": "clip"}, r"condition\.text\.path=None: encoder=clip needs the folder of a CLIP"),
        ({"encoder": "t5", "path": "t5", "depth": 3}, r"condition\.text\.depth=3 has no effect with encoder=t5"),
        ({"captions": "data"}, r"condition\.text\.templates=.* has no effect with captions=data"),
        ({"captions": "data", **NO_TEMPLATES, "varied_words": 0.5}, r"varied_words=0.5 has no effect with captions"),
    ],
)
def test_wrong_keys_are_named(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        config(**given)


def test_texts_have_no_effect_beside_another_kind() -> None:
    with pytest.raises(ValueError, match=r"condition\.text\.length=24 has no effect with kind=class: .* kind=text"):
        ConditionConfig(text=config(templates=TextConfig().templates, held_out=TextConfig().held_out))
    with pytest.raises(ValueError, match=r"condition\.kind='words' must be one of class, text, image"):
        ConditionConfig(kind="words")  # type: ignore[arg-type]


def test_a_card_gives_the_section_back() -> None:
    section = ConditionConfig(kind="text", text=config(names=(("frog", "toad"), ("cat",))))
    assert condition_config({"config": {"condition": to_dict(section)}}) == section
    assert condition_config({"config": {}}) == ConditionConfig()
