"""Restored images are held against the very test images that they were made of, beside mere enlargement."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config import DataConfig, RunConfig
from engine.device import setup
from engine.images import ImageSet, Listing
from engine.shards import Shards, ShardWriter, open_shards
from eval.config import EvalConfig
from eval.panel import Panel
from eval.pictures import Pictures
from eval.reconstruction import psnr, ssim
from eval.restoration import check_enough_test, enlarged, measure, readable, score_restorations
from eval.sample_sets import Drawn
from eval.subject import Subject
from eval.variants import Sampling
from generator.condition_config import ConditionConfig
from generator.config import DiffusionConfig
from generator.sample_folder import png_path, write_png
from tokenizer.config import TokenizerConfig
from tokenizer.encode import encode_images
from tokenizer.smaller import shrink, smaller_version

sys.path.insert(0, str(Path(__file__).parent))
from untrained import MODEL, make_run

CPU = RunConfig(device="cpu", precision="fp32", threads=1)
RESTORING = DiffusionConfig(condition=ConditionConfig(kind="image"))


def noise(number: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 3, 16, 16), dtype=torch.uint8, generator=generator)


def pictures(images: torch.Tensor, name: str = "made") -> Pictures:
    return Pictures(name=name, count=len(images), load=lambda start, stop: images[start:stop])


def test_every_pair_is_measured_across_blocks() -> None:
    made, originals = noise(70, 1), noise(70)
    found = measure(pictures(made), pictures(originals), {}, setup(CPU))
    assert torch.equal(found.values["psnr"], psnr(made, originals))
    assert torch.equal(found.values["ssim"], ssim(made, originals))
    again = measure(pictures(originals), pictures(originals), {}, setup(CPU))
    assert again.originals == found.originals and again.values["psnr"].tolist() == [100.0] * 70
    assert measure(pictures(made), pictures(made), {}, setup(CPU)).originals != found.originals


def test_images_below_the_window_of_ssim_have_psnr_alone() -> None:
    images = noise(2)[..., :8, :8]
    assert list(measure(pictures(images), pictures(images), {}, setup(CPU)).values) == ["psnr"]


def test_enlarged_images_are_the_smaller_ones_without_a_model() -> None:
    images = noise(5)
    made = enlarged(pictures(images), 4)
    assert made.count == 5 and torch.equal(made.load(1, 4), smaller_version(images[1:4], 4))


def test_rows_of_codes_are_the_images_that_can_be_read(tmp_path: Path) -> None:
    def read(index: int) -> Image.Image:
        if index == 1:
            raise OSError("cut")
        return Image.new("L", (16, 16), index)

    listing = Listing(labels=np.zeros(4, np.int64), read=read, name=str, digest="greys")
    images = ImageSet(listing, size=16, split="test", origin={"source": "greys"})
    with pytest.warns(UserWarning, match="unreadable"):
        assert readable(images, codes(tmp_path / "three", 3)).tolist() == [0, 2, 3]
    assert readable(images, codes(tmp_path / "four", 4)).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"has 2 rows, but 3 test images can be read: run `tokenloom encode` again"):
        readable(images, codes(tmp_path / "two", 2))


def codes(folder: Path, number: int) -> Shards:
    facts = {"tokenizer_fingerprint": "abc", "grid": [4, 4], "vocab_size": 0, "class_names": [], "images": {}}
    with ShardWriter(folder, views=("original",)) as writer:
        writer.append(labels=torch.zeros(number), latents=torch.zeros(number, 1, 4, 4, 4))
        return open_shards(writer.close({**facts, "latent_shape": [4, 4, 4]}))


def test_more_samples_than_test_images_are_refused() -> None:
    listing = Listing(labels=np.zeros(30, np.int64), read=lambda index: b"", name=str, digest="none")
    images = ImageSet(listing, size=16, split="test", origin={"source": "none"})
    expected = r"eval\.num_samples=31: .*kind=image.* the test split has 30; set --eval\.num_samples=30 or less"
    with pytest.raises(ValueError, match=expected):
        check_enough_test(EvalConfig(num_samples=31), RESTORING, images)
    check_enough_test(EvalConfig(num_samples=30), RESTORING, images)
    check_enough_test(EvalConfig(num_samples=31), DiffusionConfig(), images)
    check_enough_test(EvalConfig(num_samples=31), None, images)


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    """A run whose test images have smaller versions on disk."""
    from engine.sources import open_images

    run, data = make_run(tmp_path), DataConfig(size=16)
    tokenizer, device = TokenizerConfig(model=MODEL, low_resolution=4), setup(CPU)
    encode_images(run=run, data=data, tokenizer=tokenizer, device=device, splits=["test"])
    return Subject(
        run=run, config=EvalConfig(num_samples=20, features=("random",), lpips="none"), tokenizer_config=tokenizer,
        train_set=open_images(data, "train"), test_set=open_images(data, "test"), families={"diffusion": RESTORING},
        samplings=[], device=device,
    )  # fmt: skip


def scored(subject: Subject, *folders: Drawn) -> dict[tuple[str, str], dict]:
    panel = Panel(extractors=[], config=subject.config, cache=subject.run.folder / "cache", device=subject.device)
    records = score_restorations(subject, folders, panel)
    found = {(entry["subject"], entry["name"]): entry for entry in records}
    assert len(found) == len(records)
    return found


def samples(subject: Subject, made: torch.Tensor, name: str = "diffusion", **told: list) -> Drawn:
    """A folder of samples as `generator.sample` leaves it."""
    folder = subject.run.folder / "samples" / name
    folder.mkdir(parents=True)
    for row, image in enumerate(made):
        write_png(png_path(folder, row), image)
    facts = {"family": "diffusion", "generator": "abc", "tokenizer": "def", "settings": {}, "condition": "image"}
    rows = {"labels": [0] * len(made), "seeds": list(range(len(made))), **told}
    (folder / "samples.json").write_text(json.dumps({**facts, **rows}))
    return Drawn(Sampling(name, "diffusion", RESTORING), folder)


def test_samples_are_held_against_the_test_images_that_their_conditions_show(subject: Subject) -> None:
    rows = [*range(30, 50), 7]  # more samples than are scored
    truth = subject.test_set.load(np.array(rows))["images"]
    off = truth.clone()
    off[:, :, :, :8] = (off[:, :, :, :8].int() + 5).clamp(max=255).to(torch.uint8)
    found = scored(subject, samples(subject, off, images=rows))
    expected = psnr(off[:20], truth[:20])
    record = found["diffusion", "psnr"]
    assert record["value"] == pytest.approx(float(expected.mean())) and record["n"] == 20
    reach = 1.96 * float(expected.std()) / 20**0.5
    assert record["interval"][1] - record["value"] == pytest.approx(reach, rel=1e-3)
    assert found["diffusion", "ssim"]["value"] == pytest.approx(float(ssim(off[:20], truth[:20]).mean()))
    plain = psnr(smaller_version(truth[:20], 4), truth[:20])
    assert found["enlarged", "psnr"]["value"] == pytest.approx(float(plain.mean()))
    assert set(found) == {(each, name) for each in ("diffusion", "enlarged") for name in ("psnr", "ssim")}
    mine, theirs = record["protocol"], found["enlarged", "psnr"]["protocol"]
    assert mine["hash"] == theirs["hash"] and mine["settings"]["low_resolution"] == 4
    assert (mine["num_real"], mine["subject"]["generator"], mine["subject"]["condition"]) == (20, "abc", "image")
    assert "generator" not in theirs.get("subject", {})


def test_a_sheet_shows_the_smaller_image_the_sample_and_the_original(subject: Subject) -> None:
    rows = list(range(30, 50))
    truth = subject.test_set.load(np.array(rows))["images"]
    scored(subject, samples(subject, 255 - truth, images=rows))
    sheet = np.asarray(Image.open(subject.run.folder / "eval" / "restored-diffusion.png"))
    assert sheet.shape[:2] == (10 * (96 + 4 + 14) + 4, 3 * (96 + 4) + 12)  # every other of the 20
    for line, row in ((0, 0), (9, 18)):
        top, lefts = 4 + line * (96 + 4 + 14), (4, 4 + 100 + 8, 4 + 200 + 8)
        tiles = [sheet[top : top + 96, left : left + 96].transpose(2, 0, 1) for left in lefts]
        shown = (shrink(truth[row : row + 1], 4)[0], 255 - truth[row], truth[row])
        for tile, image in zip(tiles, shown, strict=True):
            times = 96 // image.shape[1]
            assert np.array_equal(tile, image.numpy().repeat(times, 1).repeat(times, 2))


def test_enlargement_is_scored_once_and_other_samples_not_at_all(subject: Subject) -> None:
    truth = subject.test_set.load(np.arange(20))["images"]
    folders = [samples(subject, truth, name, images=list(range(20))) for name in ("diffusion", "diffusion@few")]
    folders.append(samples(subject, truth, "autoregressive"))
    found = scored(subject, *folders)
    assert {each for each, _ in found} == {"diffusion", "diffusion@few", "enlarged"}
    assert found["diffusion@few", "psnr"]["value"] == 100
    assert scored(subject, folders[-1]) == {}


def test_lpips_is_measured_with_the_networks_that_are_there(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mean(torch.nn.Module):
        def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
            return (images - others).abs().mean(dim=(1, 2, 3))

    monkeypatch.setattr("eval.restoration.load_lpips", lambda net, device: Mean())
    monkeypatch.setattr("eval.restoration.lpips_nets", lambda wish, size, tell: ["vgg"])
    truth = subject.test_set.load(np.arange(20))["images"]
    with_lpips = dataclasses.replace(subject, config=dataclasses.replace(subject.config, lpips="vgg"))
    found = scored(with_lpips, samples(subject, truth, images=list(range(20))))
    assert found["diffusion", "lpips_vgg"]["value"] == 0 < found["enlarged", "lpips_vgg"]["value"]
