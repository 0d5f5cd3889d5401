"""The likelihood of test images given what a generator is told of them: their class, or a text that it never saw."""

from typing import Any

import pytest
import torch

from engine.config import DataConfig, RunConfig
from engine.device import setup
from engine.images import ImageSet
from engine.sources import open_images
from eval.generator_scores import score_likelihood
from generator.autoregressive import Autoregressive, build_network
from generator.captions import prompts_of
from generator.card import generator_card
from generator.condition_config import ConditionConfig, TextConfig
from generator.config import AutoregressiveConfig, AutoregressiveModelConfig
from tokenizer.config import TokenizerModelConfig, TowerConfig
from tokenizer.model import Tokenizer

TOWER = TowerConfig(blocks=1, width=16, heads=2, mlp=32)
MODEL = TokenizerModelConfig(patch_size=8, vocab_size=16, code_dim=4, encoder=TOWER, decoder=TOWER)
TEMPLATES = TextConfig(length=12, depth=1, templates=("{}", "a {}"), held_out=("see {}", "one {}"))
CAPTIONS = TextConfig(length=12, depth=1, captions="data")
CPU = setup(RunConfig(device="cpu", precision="fp32", threads=1))


@pytest.fixture
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(MODEL, image_size=16).eval().requires_grad_(False)


@pytest.fixture
def images() -> ImageSet:
    """Digits with captions of two lines, of which the first alone counts."""
    images = open_images(DataConfig(size=16), "test")
    images.captions = [f"number {row}\nnothing" for row in range(len(images))]
    return images


def generator_of(condition: ConditionConfig, images: ImageSet, tokenizer: Tokenizer) -> Autoregressive:
    model = AutoregressiveModelConfig(preset="tiny", depth=1, width=16, heads=2)
    card = generator_card(AutoregressiveConfig(model=model, condition=condition), images, tokenizer)
    network = build_network(model, card)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return Autoregressive(network, card | {"fingerprint": "abc"}).eval().requires_grad_(False)


def nll(generator: Autoregressive, tokenizer: Tokenizer, images: ImageSet, batch_size: int = 128) -> dict[str, Any]:
    how: dict[str, Any] = {"batch_size": batch_size, "device": CPU, "weights": "raw"}
    return score_likelihood(generator, tokenizer, images, **how)


@pytest.mark.parametrize("text", [None, TEMPLATES, CAPTIONS], ids=["labels", "templates", "captions"])
def test_each_image_is_given_its_own_condition(tokenizer: Tokenizer, images: ImageSet, text: TextConfig | None) -> None:
    condition = ConditionConfig() if text is None else ConditionConfig(kind="text", text=text)
    generator, labels = generator_of(condition, images, tokenizer), images.labels.tolist()
    told: Any = torch.from_numpy(images.labels)
    if text is not None:
        rows = [f"number {row}" for row in range(len(images))]
        told = prompts_of(text, images.class_names, labels) if text == TEMPLATES else rows
    (batch,) = images.in_order(len(images))
    expected = generator.nll(tokenizer.encode(batch["images"]), told).mean() / tokenizer.length
    found = nll(generator, tokenizer, images)
    assert found["value"] == pytest.approx(float(expected), rel=1e-6) and found["n"] == len(images)
    assert nll(generator, tokenizer, images, batch_size=50)["value"] == pytest.approx(found["value"], rel=1e-6)
    assert found["protocol"]["settings"].get("condition") == (None if text is None else "text")


def test_captions_must_be_there(tokenizer: Tokenizer, images: ImageSet) -> None:
    generator = generator_of(ConditionConfig(kind="text", text=CAPTIONS), images, tokenizer)
    bare = open_images(DataConfig(size=16), "test")
    with pytest.raises(ValueError, match=r"learned from captions, but the test images have none: set data\.caption"):
        nll(generator, tokenizer, bare)


def test_the_texts_are_none_that_training_saw(tokenizer: Tokenizer, images: ImageSet) -> None:
    generator = generator_of(ConditionConfig(kind="text", text=TEMPLATES), images, tokenizer)
    seen: list[str] = []
    ask = generator.nll

    def watched(codes: torch.Tensor, told: list[str]) -> torch.Tensor:
        seen.extend(told)
        return ask(codes, told)

    generator.nll = watched  # type: ignore[method-assign, assignment]
    nll(generator, tokenizer, images)
    words = {text.rpartition(" ")[0] for text in seen}
    assert words == {"see", "one"} and len(seen) == len(images)
    assert all(text.endswith(str(label)) for text, label in zip(seen, images.labels, strict=True))
