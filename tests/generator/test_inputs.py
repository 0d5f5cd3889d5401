"""What samples are drawn from: classes, texts and smaller images in turn, and what samples.json tells of them."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.checkpoint import save_model
from engine.config import RunConfig
from engine.device import Device
from engine.shards import ShardWriter, open_shards
from generator.autoregressive import build_network
from generator.card import generator_card
from generator.condition_config import ConditionConfig, TextConfig
from generator.config import (
    AutoregressiveConfig,
    AutoregressiveModelConfig,
    AutoregressiveSampleConfig,
    DenoiserModelConfig,
    DiffusionConfig,
    DiffusionSampleConfig,
)
from generator.diffusion import build_denoiser
from generator.inputs import choose_inputs
from generator.sample import load_generator, sample, sample_images
from generator.smaller import smaller_latents
from tokenizer.model import load_tokenizer

TEXT = ConditionConfig(
    kind="text",
    text=TextConfig(
        length=24, depth=1, templates=("{}", "a {}"), held_out=("see {}", "one {}"), names=(("x", "ex"), ("y",), ("z",))
    ),
)
SMALL: dict[str, Any] = {"depth": 1, "width": 16, "heads": 2}
TEXTS = {
    "autoregressive": AutoregressiveConfig(
        model=AutoregressiveModelConfig(preset="tiny", **SMALL), condition=TEXT,
        sample=AutoregressiveSampleConfig(batch_size=4, guidance=2.0),
    ),
    "diffusion": DiffusionConfig(
        model=DenoiserModelConfig(preset="tiny", **SMALL), condition=TEXT,
        sample=DiffusionSampleConfig(num_steps=2, batch_size=4, guidance=2.0),
    ),
}  # fmt: skip
IMAGES = dataclasses.replace(TEXTS["diffusion"], condition=ConditionConfig(kind="image"))


def untrained(run: RunConfig, config: Any) -> Any:
    family = "diffusion" if isinstance(config, DiffusionConfig) else "autoregressive"
    shards, tokenizer = open_shards(run.folder / "codes" / "train"), load_tokenizer(run.folder)
    card = generator_card(config, shards, tokenizer)
    torch.manual_seed(0)
    network = (build_denoiser if family == "diffusion" else build_network)(config.model, card)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_model(run.folder / family, network.state_dict(), card)
    return load_generator(run.folder, family)


def with_smaller(run: RunConfig) -> RunConfig:
    """The run with smaller images beside its latents."""
    for split in ("train", "test"):
        folder = run.folder / "codes" / split
        shards = open_shards(folder)
        meta = {key: value for key, value in shards.meta.items() if key not in ("n", "views", "parts", "complete")}
        batch = shards.load(np.arange(len(shards)))
        shutil.rmtree(folder)
        with ShardWriter(folder, views=("original",), vocab_size=meta["vocab_size"]) as writer:
            latents = batch["latents"][:, None]
            writer.append(
                labels=batch["labels"], codes=batch["codes"][:, None], latents=latents, smaller=latents.round()
            )
            writer.close(meta | {"low_resolution": 4})
    return run


@pytest.mark.parametrize("family", TEXTS)
def test_texts_of_a_run_are_held_out_templates_with_words_of_classes_in_turn(run: RunConfig, family: str) -> None:
    generator = untrained(run, TEXTS[family])
    inputs = choose_inputs(generator, run, num=8)
    assert inputs.labels == [0, 1, 2, 0, 1, 2, 0, 1]
    assert inputs.prompts == ["see x", "see y", "see z", "one x", "one y", "one z", "see ex", "see y"]
    assert inputs.told([7, 0]) == {"labels": [1, 0], "prompts": ["see y", "see x"]}
    only = choose_inputs(generator, run, num=2, label=1)
    assert only.labels == [1, 1] and {text.split()[-1] for text in only.prompts or []} == {"y"}


@pytest.mark.parametrize("family", TEXTS)
def test_prompts_take_turns_and_decide_the_images(run: RunConfig, device: Device, family: str) -> None:
    generator, tokenizer = untrained(run, TEXTS[family]), load_tokenizer(run.folder)
    how: dict[str, Any] = {"run": run, "config": TEXTS[family], "family": family, "device": device}
    folder = sample(**how, num=5, prompts=["a zebra", "x"])
    told = json.loads((folder / "samples.json").read_text())
    assert told["prompts"] == ["a zebra", "x", "a zebra", "x", "a zebra"] and told["labels"] == [-1] * 5
    assert told["condition"] == "text"
    images = sample_images(generator, tokenizer, told["prompts"], told["seeds"], batch_size=4, **told["settings"])
    found = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))])
    assert np.array_equal(found, images.permute(0, 2, 3, 1).numpy())
    others = sample_images(generator, tokenizer, ["x"] * 5, told["seeds"], batch_size=4, **told["settings"])
    assert torch.equal(others[1], images[1]) and not torch.equal(others[0], images[0])
    before = (folder / "samples.json").stat().st_mtime_ns
    sample(**how, num=5, prompts=["a zebra", "x"])
    assert (folder / "samples.json").stat().st_mtime_ns == before, "answered before"
    sample(**how, num=5, prompts=["a zebra"])
    assert json.loads((folder / "samples.json").read_text())["prompts"] == ["a zebra"] * 5


def test_smaller_images_are_those_of_the_test_split_spread_evenly(run: RunConfig, device: Device) -> None:
    generator = untrained(with_smaller(run), IMAGES)
    shards = open_shards(run.folder / "codes" / "test")
    inputs = choose_inputs(generator, run, num=6)
    assert inputs.images == [0, 4, 8, 12, 16, 20] and inputs.labels == shards.labels[[0, 4, 8, 12, 16, 20]].tolist()
    assert torch.equal(inputs.condition([2]), shards.load(np.array([8]))["smaller"])
    folder = sample(run=run, config=IMAGES, family="diffusion", device=device, num=6)
    assert json.loads((folder / "samples.json").read_text())["images"] == inputs.images
    with pytest.raises(ValueError, match=r"num=25 .* the test split has 24"):
        choose_inputs(generator, run, num=25)
    generator.condition.factor = 8
    with pytest.raises(
        ValueError, match=r"test has smaller images of 1/4 .* from 1/8: set tokenizer\.low_resolution=8"
    ):
        choose_inputs(generator, run, num=6)


def test_files_of_smaller_images_take_turns(run: RunConfig, tmp_path: Path) -> None:
    generator, tokenizer = untrained(with_smaller(run), IMAGES), load_tokenizer(run.folder)
    paths = [tmp_path / f"{name}.png" for name in "ab"]
    for number, path in enumerate(paths):
        Image.fromarray(np.full((4, 4, 3), 100 * number, np.uint8)).save(path)
    inputs = choose_inputs(generator, run, num=3, images=paths)
    names = [str(name).partition(":") for name in inputs.images or []]
    assert [name for name, _, _ in names] == ["a.png", "b.png", "a.png"]
    assert names[0][2] == names[2][2] != names[1][2], "their hash"
    assert torch.equal(inputs.condition([0, 1, 2]), smaller_latents(tokenizer, paths, factor=4)[[0, 1, 0]])


def test_what_does_not_fit_the_generator_is_refused(run: RunConfig, tmp_path: Path) -> None:
    text = untrained(run, TEXTS["diffusion"])
    plain = untrained(run, dataclasses.replace(TEXTS["autoregressive"], condition=ConditionConfig()))
    with pytest.raises(ValueError, match=r"--prompt is of a generator with condition\.kind=text, .* kind=class"):
        choose_inputs(plain, run, num=1, prompts=["x"])
    with pytest.raises(ValueError, match=r"--image is of a generator with condition\.kind=image, .* kind=text"):
        choose_inputs(text, run, num=1, images=[tmp_path])
    with pytest.raises(ValueError, match=r"--label=1 has no effect beside prompts"):
        choose_inputs(text, run, num=1, prompts=["x"], label=1)
    with pytest.raises(ValueError, match=r"has 30 tokens, but condition\.text\.length=24 leaves room for 23"):
        choose_inputs(text, run, num=1, prompts=["fits", "x" * 30])
    with pytest.raises(ValueError, match="num=0 must be at least 1"):
        choose_inputs(plain, run, num=0)
    with pytest.raises(ValueError, match=r"set tokenizer\.low_resolution"):
        choose_inputs(untrained(run, IMAGES), run, num=1)
