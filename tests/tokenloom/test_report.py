"""The report says what a run folder holds, whatever it holds, in one file that needs no other."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from engine.checkpoint import write_json
from engine.log import save_grid
from engine.shards import ShardWriter
from tokenloom.pictures import cut_grid, save_overview
from tokenloom.report import CHAPTERS, num_weights, write_report

EVIL = '<script>alert("cat")</script>'
NAMES = [EVIL, "zebra & co", *(f"animal {number}" for number in range(2, 10))]
SIZE, VOCAB = 16, 32


def make_run(folder: Path, *, labels: bool = True) -> Path:
    """A complete run folder with invented figures."""
    rng = np.random.default_rng(0)
    tokenizer = {"kind": "tokenizer", "config": {"model": {"patch_size": 4, "vocab_size": VOCAB}, "image_size": SIZE}}
    write_stage(folder, "tokenizer", tokenizer, curve("loss", "psnr", "usage", "perplexity"))
    write_stage(folder, "autoregressive", {"family": "autoregressive"}, curve("loss"))
    write_stage(folder, "diffusion", {"family": "diffusion"}, curve("loss", "loss_quarter_1", "loss_quarter_4"))
    for split in ("train", "test"):
        write_codes(folder / "codes" / split, split, rng)
    pairs = torch.from_numpy(rng.integers(0, 256, (8, 3, SIZE, SIZE), dtype=np.uint8))
    save_grid(pairs, folder / "tokenizer" / "previews" / "step-00000040-reconstructions.png", columns=2)
    save_grid(pairs[:4], folder / "diffusion" / "previews" / "step-00000040-samples.png", columns=2)
    for family in ("autoregressive", "diffusion"):
        write_samples(folder / "samples" / family, family, rng, labels=labels)
    write_json(folder / "eval" / "metrics.json", scores())
    write_json(folder / "eval" / "probe.json", {"protocol": {}, "curve": probe()})
    write_json(folder / "eval" / "classifier" / "model.json", {"kind": "classifier", "accuracy": 0.9714})
    stages = ("tokenizer", "encode", "autoregressive", "diffusion", "samples of diffusion", "eval")
    write_json(folder / "stages.json", {name: {"seconds": 7.5 * place + 1} for place, name in enumerate(stages)})
    (folder / "config.yaml").write_text(f"run: {{name: '{EVIL}'}}\ntokenizer: {{}}\nautoregressive: {{}}\ndiffusion: {{}}\n")
    return folder


def write_stage(folder: Path, stage: str, card: dict, lines: list[dict]) -> None:
    (folder / stage).mkdir(parents=True)
    save_file({"weight": torch.zeros(3, 5), "bias": torch.zeros(5)}, folder / stage / "model.safetensors")
    write_json(folder / stage / "model.json", {**card, "fingerprint": f"f00d{stage}"})
    (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def curve(*keys: str) -> list[dict]:
    lines = [{"step": step, **{key: 3.0 / step for key in keys}, "samples_per_second": 100.0} for step in range(5, 45, 5)]
    lines.append({"step": 40, **{f"validation/{key}": 0.1 for key in (*keys, "nll", "unigram_entropy")}})
    return [*lines, {"step": 45, "loss": "nan"}]


def write_codes(folder: Path, split: str, rng: np.random.Generator) -> None:
    with ShardWriter(folder, views=("original",), vocab_size=VOCAB) as writer:
        codes = torch.from_numpy(rng.integers(0, VOCAB - 4, (20, 1, 16)))
        writer.append(labels=torch.zeros(20, dtype=torch.int64), codes=codes)
        images = {"source": "folder", "path": f"data/{EVIL[:8]}", "split": split, "size": SIZE, "n": 1234}
        facts = {"tokenizer_fingerprint": "f00d", "grid": [4, 4], "vocab_size": VOCAB, "latent_shape": [2, 4, 4]}
        writer.close({**facts, "class_names": NAMES, "images": images})


def write_samples(folder: Path, family: str, rng: np.random.Generator, *, labels: bool) -> None:
    folder.mkdir(parents=True)
    chosen = [number % 10 if labels else -1 for number in range(40)]
    for number in range(40):
        pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.png")
    told = {"family": family, "labels": chosen, "seeds": list(range(40)), "class_names": NAMES if labels else []}
    write_json(folder / "samples.json", {**told, "settings": {"guidance": 2.0}})


def scores() -> list[dict]:
    def one(name: str, subject: str, value: float, **more: object) -> dict:
        features = {"features": {"name": "classifier"}} if name.startswith(("fd", "kid", "class")) else {}
        stated = {"judge": 1, "data": {"source": "folder", "path": EVIL}, "size": SIZE, **features}
        return {"name": name, "subject": subject, "value": value, "interval": [0.9 * value, 1.1 * value], "n": 500, **more, "protocol": stated}

    families = ("autoregressive", "diffusion")
    found = [one("usage_256", "tokenizer", 0.5), one("psnr", "tokenizer", 23.4567), one("usage", "tokenizer", 0.875)]
    found += [one("fd_classifier", "real", 0.01234)]
    found += [one("fd_classifier", family, 4.5678) for family in families]
    found += [one("class_accuracy", family, 0.95) for family in families]
    found += [one("probe_top1", "pixels", 0.8, tap="pixels"), one("probe_top1", "diffusion", 0.9, tap="block_2")]
    return [*found, one("never_heard_of", "stranger", 1e-9)]


def probe() -> list[dict]:
    taps = [("pixels", "pixels"), ("tokenizer", "encoder.0"), ("tokenizer", "codes"), ("diffusion", "block_1"), ("diffusion", "block_2")]
    return [
        {"family": family, "tap": tap, "test_top1": 0.8 + place / 100, "interval": [0.7, 0.95] if place else [float("nan")] * 2}
        for place, (family, tap) in enumerate(taps)
    ]


class Page(HTMLParser):
    """Counts what the tests ask for, and checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[dict] = []
        self.headings: list[int] = []
        self.words = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        told = dict(attributes)
        self.ids += [told["id"]] if "id" in told else []
        self.links += [told[key] for key in ("src", "href", "srcset", "action", "data", "xlink:href") if key in told]
        self.images += [told] if tag == "img" else []
        self.headings += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return read(write_report(make_run(tmp_path_factory.mktemp("runs") / "zoo")))


def test_a_page_holds_all_that_it_shows(full: Page):
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in full.links)
    assert set(CHAPTERS) == set(full.ids)
    assert {f"#{name}" for name in CHAPTERS} <= set(full.links)
    assert all(image["alt"] for image in full.images)
    assert len(full.images) == 2 * 40 + 8 + 1
