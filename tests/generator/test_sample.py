"""Images from a generator: in memory, and as files that say what they are."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.checkpoint import save_model
from engine.config import RunConfig
from engine.device import Device
from engine.shards import open_shards
from generator.autoregressive import build_network
from generator.card import generator_card
from generator.config import (
    AutoregressiveConfig,
    AutoregressiveModelConfig,
    AutoregressiveSampleConfig,
    DenoiserModelConfig,
    DiffusionConfig,
    DiffusionSampleConfig,
)
from generator.diffusion import build_denoiser
from generator.partial import paint_partial
from generator.sample import load_generator, sample, sample_images, stream_images
from generator.sample_folder import grid_rows
from tokenizer.model import load_tokenizer

CONFIGS = {
    "autoregressive": AutoregressiveConfig(
        model=AutoregressiveModelConfig(preset="tiny", depth=1, width=16, heads=2),
        sample=AutoregressiveSampleConfig(batch_size=4),
    ),
    "diffusion": DiffusionConfig(
        model=DenoiserModelConfig(preset="tiny", depth=1, width=16, heads=2),
        sample=DiffusionSampleConfig(num_steps=2, batch_size=4),
    ),
}
FAMILIES = tuple(CONFIGS)


@pytest.fixture
def finished(run: RunConfig) -> RunConfig:
    """The run with an untrained generator of each family."""
    shards, tokenizer = open_shards(run.folder / "codes" / "train"), load_tokenizer(run.folder)
    for (family, config), build in zip(CONFIGS.items(), (build_network, build_denoiser), strict=True):
        card = generator_card(config, shards, tokenizer)
        torch.manual_seed(0)
        network = build(config.model, card)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        save_model(run.folder / family, network.state_dict(), card)
    return run


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_depends_on_its_seed_and_label_alone(finished: RunConfig, family: str) -> None:
    generator, tokenizer = load_generator(finished.folder, family), load_tokenizer(finished.folder)
    settings = {} if family == "autoregressive" else {"num_steps": 2}
    labels, seeds = torch.tensor([0, 1, 2, 0, 1]), [5, 6, 7, 8, 9]
    images = sample_images(generator, tokenizer, labels, seeds, batch_size=4, **settings)
    assert (images.shape, images.dtype) == ((5, 3, 16, 16), torch.uint8)
    some = sample_images(generator, tokenizer, labels[[4, 1]], [9, 6], batch_size=4, **settings)
    assert torch.equal(some, images[[4, 1]])
    other = sample_images(generator, tokenizer, labels, seeds, batch_size=3, **settings)
    assert (other.int() - images.int()).abs().max() <= 1
    assert len(images.unique(dim=0)) == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_another_tokenizer_is_refused(finished: RunConfig, family: str) -> None:
    generator, tokenizer = load_generator(finished.folder, family), load_tokenizer(finished.folder)
    tokenizer.code_fingerprint = "f" * 16
    with pytest.raises(ValueError, match="not ffffffffffffffff: load the tokenizer of its own run"):
        sample_images(generator, tokenizer, None, [0])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_door_writes_pictures_a_grid_and_what_they_are(finished: RunConfig, device: Device, family: str) -> None:
    folder = sample(run=finished, config=CONFIGS[family], family=family, device=device, num=7, seed=2)
    assert folder == finished.folder / "samples" / family
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"{row:06d}.png" for row in range(7)), "grid.png", "samples.json",
    ]  # fmt: skip
    told = json.loads((folder / "samples.json").read_text())
    assert told["labels"] == [0, 1, 2, 0, 1, 2, 0]
    assert told["seeds"] == list(range(2_000_000, 2_000_007))
    generator, tokenizer = load_generator(finished.folder, family), load_tokenizer(finished.folder)
    assert (told["family"], told["generator"], told["tokenizer"]) == (
        family, generator.fingerprint, tokenizer.fingerprint,
    )  # fmt: skip
    images = sample_images(
        generator, tokenizer, torch.tensor(told["labels"]), told["seeds"], batch_size=4, **told["settings"]
    )
    assert np.array_equal(pictures(folder), images.permute(0, 2, 3, 1).numpy())


def test_one_label_and_another_folder(finished: RunConfig, device: Device, tmp_path: Path) -> None:
    config, out = CONFIGS["autoregressive"], tmp_path / "elsewhere"
    folder = sample(run=finished, config=config, family="autoregressive", device=device, num=3, label=2, out=out)
    assert folder == out
    assert json.loads((out / "samples.json").read_text())["labels"] == [2, 2, 2]
    with pytest.raises(ValueError, match=r"label 3 must be 0 \.\. 2"):
        sample(run=finished, config=config, family="autoregressive", device=device, num=3, label=3)
    with pytest.raises(ValueError, match="num=0 must be at least 1"):
        sample(run=finished, config=config, family="autoregressive", device=device, num=0)


def test_the_tokenizer_of_another_run_paints(finished: RunConfig, device: Device, tmp_path: Path) -> None:
    settings = {"config": CONFIGS["diffusion"], "family": "diffusion", "device": device, "num": 2}
    own = sample(run=finished, **settings, out=tmp_path / "own")
    (tmp_path / "borrowing").mkdir()
    (finished.folder / "diffusion").rename(tmp_path / "borrowing" / "diffusion")
    borrowing = dataclasses.replace(finished, name="borrowing", tokenizer=str(finished.folder))
    folder = sample(run=borrowing, **settings)
    assert folder == tmp_path / "borrowing" / "samples" / "diffusion"
    assert np.array_equal(pictures(folder), pictures(own))


def test_samples_are_reused_and_replaced_by_request(finished: RunConfig, device: Device) -> None:
    settings = {"run": finished, "family": "autoregressive", "device": device, "num": 5}
    folder = sample(config=CONFIGS["autoregressive"], **settings)
    before = (folder / "000000.png").stat().st_mtime_ns
    faster = AutoregressiveSampleConfig(batch_size=2)
    sample(config=dataclasses.replace(CONFIGS["autoregressive"], sample=faster), **settings)
    assert (folder / "000000.png").stat().st_mtime_ns == before
    greedy = AutoregressiveSampleConfig(batch_size=4, temperature=0)
    sample(config=dataclasses.replace(CONFIGS["autoregressive"], sample=greedy), **settings | {"num": 2})
    assert json.loads((folder / "samples.json").read_text())["settings"]["temperature"] == 0
    assert len(pictures(folder)) == 2


def test_an_interrupted_call_continues(
    finished: RunConfig, device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = {"run": finished, "config": CONFIGS["diffusion"], "family": "diffusion", "device": device, "num": 10}
    whole = sample(**settings, out=tmp_path / "whole")
    calls = []

    def interrupt_third(*args, **kwargs) -> torch.Tensor:
        calls.append(args[3])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample_images(*args, **kwargs)

    monkeypatch.setattr("generator.sample.sample_images", interrupt_third)
    with pytest.raises(KeyboardInterrupt):
        sample(**settings)
    assert not (finished.folder / "samples" / "diffusion").exists()
    folder = sample(**settings)
    assert calls[2] == calls[3]
    assert len(calls) == 4
    assert np.array_equal(pictures(folder), pictures(whole))


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_go_round_and_begin_with_the_samples_that_are_there(
    finished: RunConfig, device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str
) -> None:
    settings = {"run": finished, "config": CONFIGS[family], "family": family, "device": device, "num": 8}
    plain, drawn = sample(**settings), []

    def counted(*args, **kwargs) -> torch.Tensor:
        drawn.extend(args[3])
        return sample_images(*args, **kwargs)

    monkeypatch.setattr("generator.sample.sample_images", counted)
    pool = sample(**settings, candidates=20, out=tmp_path / "pool", known=[plain])
    assert drawn == list(range(8, 20))  # the first two batches were there
    told = json.loads((pool / "samples.json").read_text())
    assert told["labels"] == [0, 1, 2, 0, 1, 2, 0, 1] * 2 + [0, 1, 2, 0]
    assert np.array_equal(pictures(pool)[:8], pictures(plain))
    sample(**settings, candidates=12, out=pool)
    assert len(drawn) == 12 and len(pictures(pool)) == 20  # more than are asked for will do
    sample(**settings, candidates=24, out=pool)
    assert drawn[12:] == list(range(20, 24))


def test_pictures_of_other_settings_or_classes_are_not_taken_over(finished: RunConfig, device: Device) -> None:
    settings = {"run": finished, "config": CONFIGS["autoregressive"], "family": "autoregressive", "device": device}
    plain = sample(**settings, num=4)
    greedy = AutoregressiveSampleConfig(batch_size=4, temperature=0)
    others = dataclasses.replace(CONFIGS["autoregressive"], sample=greedy)
    out = finished.folder / "samples" / "others"
    fresh = pictures(sample(**settings | {"config": others}, num=4, out=out))
    assert np.array_equal(pictures(sample(**settings | {"config": others}, num=4, out=out, known=[plain])), fresh)
    ones = sample(**settings, num=4, label=1, out=out, known=[plain])
    assert not np.array_equal(pictures(ones)[0], pictures(plain)[0])
    assert np.array_equal(pictures(ones)[1], pictures(plain)[1])


def test_compilation_is_passed_on_and_names_no_sample(
    finished: RunConfig, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def plainly(*args, compile: bool, **kwargs) -> torch.Tensor:
        asked.append(compile)
        return sample_images(*args, **kwargs)

    monkeypatch.setattr("generator.sample.sample_images", plainly)
    compiled = AutoregressiveSampleConfig(batch_size=4, compile=True)
    config = dataclasses.replace(CONFIGS["autoregressive"], sample=compiled)
    folder = sample(run=finished, config=config, family="autoregressive", device=device, num=2)
    assert asked == [True]
    assert "compile" not in json.loads((folder / "samples.json").read_text())["settings"]


def test_in_bf16_batches_and_compilation_are_part_of_the_request(
    finished: RunConfig, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.device.has_bf16", lambda _: True)
    asked = []

    def eagerly(*args, compile: bool, **kwargs) -> torch.Tensor:
        asked.append((kwargs["batch_size"], compile))
        return sample_images(*args, **kwargs)

    monkeypatch.setattr("generator.sample.sample_images", eagerly)
    wishes = [{}, {"compile": True}, {"compile": True}, {"compile": True, "batch_size": 3}]
    for wish in wishes:
        drawing = AutoregressiveSampleConfig(precision="bf16", **{"batch_size": 2, **wish})
        config = dataclasses.replace(CONFIGS["autoregressive"], sample=drawing)
        folder = sample(run=finished, config=config, family="autoregressive", device=device, num=2)
        told = json.loads((folder / "samples.json").read_text())["settings"]
        assert (told["batch_size"], told["compile"]) == (drawing.batch_size, drawing.compile)
    assert asked == [(2, False), (2, True), (3, True)]


def test_samples_of_before_a_setting_came_are_kept(finished: RunConfig, device: Device) -> None:
    settings = {"run": finished, "family": "autoregressive", "device": device, "num": 3}
    folder = sample(config=CONFIGS["autoregressive"], **settings)
    told = json.loads((folder / "samples.json").read_text())
    del told["settings"]["top_p"]
    (folder / "samples.json").write_text(json.dumps(told))
    stamp = (folder / "000000.png").stat().st_mtime_ns
    sample(config=CONFIGS["autoregressive"], **settings)
    assert (folder / "000000.png").stat().st_mtime_ns == stamp
    narrow = dataclasses.replace(CONFIGS["autoregressive"], sample=AutoregressiveSampleConfig(top_p=0.5))
    sample(config=narrow, **settings)
    assert (folder / "000000.png").stat().st_mtime_ns != stamp


def test_streamed_images_grow_from_grey_to_the_samples(finished: RunConfig) -> None:
    generator, tokenizer = load_generator(finished.folder, "autoregressive"), load_tokenizer(finished.folder)
    labels, seeds = torch.tensor([0, 2]), [3, 4]
    steps = list(stream_images(generator, tokenizer, labels, seeds, every=6, temperature=0.5))
    assert [done for done, _ in steps] == [6, 12, 16]
    assert all((images.shape, images.dtype) == ((2, 3, 16, 16), torch.uint8) for _, images in steps)
    first = steps[0][1]  # a row of four codes and two more stand
    assert (first[:, :, 4:8, 8:] == 128).all() and (first[:, :, 8:] == 128).all()
    assert (first[:, :, :4] != 128).any() and (first[:, :, 4:8, :8] != 128).any()
    whole = sample_images(generator, tokenizer, labels, seeds, batch_size=2, temperature=0.5)
    assert torch.equal(steps[-1][1], whole)


def test_what_cannot_be_streamed_is_refused_at_the_call(finished: RunConfig) -> None:
    tokenizer = load_tokenizer(finished.folder)
    generators = {family: load_generator(finished.folder, family) for family in FAMILIES}
    with pytest.raises(ValueError, match="diffusion do not grow code by code"):
        stream_images(generators["diffusion"], tokenizer, None, [0], every=1)
    with pytest.raises(ValueError, match="every=0 must be at least 1"):
        stream_images(generators["autoregressive"], tokenizer, None, [0], every=0)
    with pytest.raises(ValueError, match=r"label 3 must be 0 \.\. 2"):
        stream_images(generators["autoregressive"], tokenizer, torch.tensor([3]), [0], every=1)


def test_a_picture_on_the_way_changes_no_sample_and_is_gone_at_the_end(
    finished: RunConfig, device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = {"run": finished, "config": CONFIGS["autoregressive"], "family": "autoregressive", "device": device}
    plain, partial, shown = sample(**settings, num=6, out=tmp_path / "plain"), tmp_path / "shown-partial.png", []
    monkeypatch.setattr("generator.watch.SECONDS", 0.0)

    def painted(tokenizer, codes: torch.Tensor, done: int) -> torch.Tensor:
        shown.append((len(codes), done, partial.exists()))
        return paint_partial(tokenizer, codes, done)

    monkeypatch.setattr("generator.watch.paint_partial", painted)
    watched = sample(**settings, num=6, out=tmp_path / "shown", partial=partial)
    assert [step[:2] for step in shown] == [(count, done) for count in (4, 2) for done in range(1, 17)]
    assert all(exists for _, _, exists in shown[1:]) and not partial.exists()
    assert capsys.readouterr().out.count(str(partial)) == 1
    for row in range(6):
        assert (plain / f"{row:06d}.png").read_bytes() == (watched / f"{row:06d}.png").read_bytes()
    with pytest.raises(ValueError, match="diffusion do not grow"):
        sample(**settings | {"family": "diffusion", "config": CONFIGS["diffusion"]}, partial=partial)


def test_a_folder_of_other_files_is_left_alone(finished: RunConfig, device: Device, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(ValueError, match=r"holds files but no samples\.json"):
        sample(
            run=finished, config=CONFIGS["diffusion"], family="diffusion", device=device, num=1, out=tmp_path / "mine"
        )
    assert (tmp_path / "mine" / "diary.txt").exists()
    for foreign in ("{}", "[]", "3", '{"family": "diffusion", "settings": 4}', '{"family": "autoreg'):
        (tmp_path / "mine" / "samples.json").write_text(foreign)
        with pytest.raises(ValueError, match=r"no samples\.json of ours: choose another folder, or empty it"):
            sample(
                run=finished, config=CONFIGS["diffusion"], family="diffusion", device=device, num=1,
                out=tmp_path / "mine",
            )  # fmt: skip
        assert (tmp_path / "mine" / "samples.json").read_text() == foreign


def test_load_generator_says_what_is_missing(finished: RunConfig) -> None:
    with pytest.raises(ValueError, match="has not been trained to its end"):
        load_generator(finished.folder / "codes", "diffusion")
    with pytest.raises(ValueError, match="describes 'diffusion', not family='autoregressive'"):
        load_generator(finished.folder / "diffusion", "autoregressive")


def test_grid_has_a_row_for_each_class() -> None:
    assert grid_rows([0, 1, 2, 0, 1, 2, 0]) == ([0, 3, 1, 4, 2, 5], 2)
    assert grid_rows([-1] * 70) == (list(range(64)), 8)
    assert grid_rows([4, 4, 4]) == ([0, 1, 2], 3)
    rows, columns = grid_rows([index % 1000 for index in range(2000)])
    assert (len(rows), columns) == (20, 2)
