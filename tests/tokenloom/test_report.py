"""The report says what a run folder holds, whatever it holds, in one file that needs no other."""

import base64
import io
import itertools
import json
import re
import shutil
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
from tokenloom import gallery
from tokenloom.pictures import cut_grid, save_overview
from tokenloom.report import CHAPTERS, num_weights, write_report
from tokenloom.run_files import RunFiles

EVIL = '<script>alert("cat")</script>'
NAMES = [EVIL, "zebra & co", *(f"animal {number}" for number in range(2, 10))]
SIZE, VOCAB = 16, 32


def make_run(folder: Path, *, labels: bool = True) -> Path:
    """A complete run folder with invented figures."""
    rng = np.random.default_rng(0)
    tokenizer = {"kind": "tokenizer", "config": {"model": {"patch_size": 4, "vocab_size": VOCAB}, "image_size": SIZE}}
    write_stage(folder, "tokenizer", tokenizer, curve("loss", "psnr", "usage", "perplexity"))
    write_stage(folder, "autoregressive", {"family": "autoregressive"}, curve("loss"))
    write_stage(folder, "diffusion", {"family": "diffusion"}, [*curriculum(8), *curve("loss")[-2:]])
    for split in ("train", "test"):
        write_codes(folder / "codes" / split, split, rng)
    pairs = torch.from_numpy(rng.integers(0, 256, (8, 3, SIZE, SIZE), dtype=np.uint8))
    save_grid(pairs, folder / "tokenizer" / "previews" / "step-00000040-reconstructions.png", columns=2)
    save_grid(pairs[:4], folder / "diffusion" / "previews" / "step-00000040-samples.png", columns=2)
    strip = pairs[:4].repeat(16, 1, 1, 1)
    save_grid(strip, folder / "autoregressive" / "previews" / "step-00000040-partial.png", columns=8)
    for family in ("autoregressive", "diffusion"):
        write_samples(folder / "samples" / family, family, rng, labels=labels)
    (folder / "eval").mkdir()
    Image.new("RGB", (600, 220), "orange").save(folder / "eval" / "neighbours-diffusion.png")
    write_json(folder / "eval" / "metrics.json", scores())
    write_json(folder / "eval" / "probe.json", {"protocol": {}, "curve": probe()})
    for name, accuracy in (("classifier", 0.9714), ("rejection_classifier", 0.9731)):
        write_json(folder / "eval" / name / "model.json", {"kind": "classifier", "accuracy": accuracy})
    stages = ("tokenizer", "encode", "autoregressive", "diffusion", "samples of diffusion", "eval")
    write_json(folder / "stages.json", {name: {"seconds": 7.5 * place + 1} for place, name in enumerate(stages)})
    (folder / "config.yaml").write_text(f"run: {{name: '{EVIL}'}}\ndiffusion: {{train: {{steps: 90}}}}\n")
    return folder


def write_stage(folder: Path, stage: str, card: dict, lines: list[dict]) -> None:
    (folder / stage).mkdir(parents=True)
    save_file({"weight": torch.zeros(3, 5), "bias": torch.zeros(5)}, folder / stage / "model.safetensors")
    write_json(folder / stage / "model.json", {**card, "fingerprint": f"f00d{stage}"})
    (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def curve(*keys: str) -> list[dict]:
    keys, steps = (*keys, "samples_per_second"), range(5, 45, 5)
    lines = [{"step": step, **dict.fromkeys(keys, 3.0 / step)} for step in steps]
    lines.append({"step": 40, **{f"validation/{key}": 0.1 for key in (*keys[:-1], "nll", "unigram_entropy")}})
    return [*lines, {"step": 45, "loss": "nan"}]


def curriculum(num_clusters: int, *, stages: int = 8, every: int = 5) -> list[dict]:
    """Lines of a log: each begins a stage, which adds a bin of log SNR and a cluster."""
    lines = []
    for stage in range(1, stages + 1):
        shares = [1 / stage] * stage + [0.0] * (stages - stage)
        line = {"step": every * stage, "loss": 1 / stage, "samples_per_second": 9.0, "mean_logsnr": float(stage)}
        line |= {
            "curriculum/stage": stage,
            "curriculum/draws": {"edges": list(range(-8, stages - 7)), "shares": shares},
        }
        line |= {"curriculum/lowest_logsnr": -18.42, "curriculum/highest_logsnr": stage - 8.0}
        active = range(max(1, num_clusters + 1 - stage), num_clusters + 1)
        lines.append(line | {f"loss_cluster/{number:02d}": number / 2**stage for number in active})
    told = {f"validation/loss_cluster/{number:02d}": float(number) for number in range(1, num_clusters + 1)}
    return [*lines, {"step": every * stages, "validation/loss": 0.5, **told}]


def write_codes(folder: Path, split: str, rng: np.random.Generator) -> None:
    with ShardWriter(folder, views=("original",), vocab_size=VOCAB) as writer:
        codes = torch.from_numpy(rng.integers(0, VOCAB - 4, (20, 1, 16)))
        writer.append(labels=torch.zeros(20, dtype=torch.int64), codes=codes)
        images = {"source": "folder", "path": f"data/{EVIL[:8]}", "split": split, "size": SIZE, "n": 1234}
        facts = {"tokenizer_fingerprint": "f00d", "grid": [4, 4], "vocab_size": VOCAB, "latent_shape": [2, 4, 4]}
        writer.close({**facts, "class_names": NAMES, "images": images})


def write_samples(folder: Path, family: str, rng: np.random.Generator, *, labels: bool) -> None:
    folder.mkdir(parents=True)
    chosen = [number % 10 if labels else -1 for number in range(20)]
    for number in range(20):
        pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.png")
    told = {"family": family, "labels": chosen, "seeds": list(range(20)), "class_names": NAMES if labels else []}
    write_json(folder / "samples.json", {**told, "settings": {"guidance": 2.0}})


def scores() -> list[dict]:
    def one(name: str, subject: str, value: float, **more: object) -> dict:
        features = {"features": {"name": "classifier"}} if name.startswith(("fd", "kid", "class")) else {}
        stated = {"judge": 1, "data": {"source": "folder", "path": EVIL}, "size": SIZE, **features}
        interval = [0.9 * value, 1.1 * value]
        told = {"name": name, "subject": subject, "value": value, "interval": interval, "n": 500, **more}
        return {**told, "protocol": stated}

    families = ("autoregressive", "diffusion")
    found = [one("usage_256", "tokenizer", 0.5), one("psnr", "tokenizer", 23.4567), one("usage", "tokenizer", 0.875)]
    found += [one("fd_classifier", "real", 0.01234)]
    found += [one("fd_classifier", family, 4.5678) for family in families]
    found += [one("class_accuracy", family, 0.95) for family in families]
    found += [one("probe_top1", "pixels", 0.8, tap="pixels"), one("probe_top1", "diffusion", 0.9, tap="dit.block2")]
    found += [one("class_accuracy", f"autoregressive@accept{share}", 0.99) for share in (0.25, 0.5)]
    found += [one("probe_top1", "autoregressive", 0.93, tap="vim.block2")]
    found += [
        one("probe_top1", "autoregressive_random", 0.85, tap="vim_random.block1"),
        one("is", "odd@accept1e9", 1.0),
    ]
    found += [one("probe_top1", "tokenizer", 0.82, tap="tokenizer.codes"), one("copies", "diffusion", 0.125)]
    found += [one("knn_top1", "autoregressive", 0.7, tap="vim.block1"), one("knn_top1", "diffusion", 0.7, tap="gone")]
    found += [one("fid500_clean", "diffusion", 7.654), one("density", "diffusion", 0.8)]
    return [*found, one("never_heard_of", "stranger", 1e-9)]


def probe() -> list[dict]:
    taps = ["pixels pixels", "tokenizer tokenizer.encoder.1", "tokenizer tokenizer.codes", "diffusion dit.block1"]
    taps += ["diffusion dit.block2"]
    taps += [f"autoregressive{twin} vim{twin}.block{block}" for twin in ("", "_random") for block in (1, 2)]
    rows = []
    for place, (family, tap) in enumerate(each.split() for each in taps):
        interval = [0.7, 0.95] if place else [float("nan")] * 2
        row = {"family": family, "tap": tap, "test_top1": 0.8 + place / 100, "interval": interval, "test_top5": None}
        rows.append({**row, "knn_top1": 0.7 + place / 100} if family == "autoregressive" else row)
    return rows


class Page(HTMLParser):
    """Counts what the tests ask for, and checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[dict] = []
        self.headings: list[int] = []
        self.charts: list[str] = []
        self.words = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        told = dict(attributes)
        self.ids += [told["id"]] if "id" in told else []
        self.links += [told[key] for key in ("src", "href", "srcset", "action", "data", "xlink:href") if key in told]
        self.images += [told] if tag == "img" else []
        self.charts += [told["aria-label"]] if tag == "svg" else []
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


def test_the_report_shows_how_an_image_fills_in_and_takes_it_for_no_sample(tmp_path: Path) -> None:
    run = RunFiles(make_run(tmp_path / "run"))
    assert "images filling in at step 40" in gallery.filling(run)
    assert gallery.previews(run, "autoregressive", wide=False) == ""
    assert gallery.previews(run, "diffusion", wide=False) != ""


def test_a_page_holds_all_that_it_shows(full: Page):
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in full.links)
    assert set(CHAPTERS) == set(full.ids)
    assert {f"#{name}" for name in CHAPTERS} <= set(full.links)
    assert all(image["alt"] for image in full.images)
    assert len(full.images) == 2 * 20 + 8 + 1 + 1 + 1


def test_a_page_tells_every_subject(full: Page):
    words = ("Autoregressive transformer", "Latent diffusion", "Tokenizer", "Raw pixels", "stranger", "never_heard_of")
    figures = ("23.46", "87.5", "4.57", "0.0123", "97.1", "1,234 training images", "4 × 4 = 16 tokens", "32 codes")
    others = (
        "chosen block2: 84.0 %",
        "FID-500",
        "Copies",
        "Density",
        "0.800",
        "animal 9",
        "8.5 s",
        "f00ddiffusion",
        "1.00e−09",
        "samples of diffusion",
    )
    missing = [text for text in (*words, *figures, *others) if text not in full.words]
    assert not missing
    assert "nan" not in full.words


def test_a_probe_is_drawn_beside_its_baselines(full: Page, tmp_path: Path):
    chart = next(each for each in full.charts if each.startswith("Autoregressive transformer. chosen"))
    told = ["chosen block2", "k-NN, chosen block1: 75.0 %: from 75 to 76 %, 2 points", "raw pixels 80.0 %"]
    told += ["untrained, chosen block1: 87.0 %", "tokenizer, codes: 82.0 %"]
    assert [each for each in told if each.replace("76 %,", "76 top-1, %,") not in chart] == []
    folder = make_run(tmp_path / "zoo")
    rows = [row for row in probe() if "diff" in row["family"]] + [
        {"family": "dino", "tap": "timm:vit:dino", "test_top1": 0.88, "interval": None, "knn_top1": None}
    ]
    write_json(folder / "eval" / "probe.json", {"curve": rows})
    page = read(write_report(folder))
    (chart,) = (each for each in page.charts if "chosen" in each)
    assert "untrained" not in chart and "raw pixels" not in chart and "k-NN" not in chart
    assert "dino 88.0 %" in chart
    assert "timm:vit:dino" in page.words and "top-5" not in page.words


def test_the_sheet_of_nearest_training_images_is_shown_with_the_share_of_copies(full: Page, tmp_path: Path):
    assert "copies: 12.5\u00a0% of 500 samples" in full.words
    assert [image for image in full.images if "nearest training images" in image["alt"]]
    folder = make_run(tmp_path / "zoo")
    (folder / "eval" / "neighbours-diffusion.png").unlink()
    assert "No sheets so far" in read(write_report(folder)).words


def test_large_sheets_are_shrunk(tmp_path: Path):
    (tmp_path / "eval").mkdir()
    for family in ("autoregressive", "diffusion"):
        Image.new("RGB", (1800, 2400), "orange").save(tmp_path / "eval" / f"neighbours-{family}.png")
    shown = re.findall('base64,([^"]+)', gallery.neighbours(RunFiles(tmp_path)))
    sizes = [Image.open(io.BytesIO(base64.b64decode(each))).size for each in shown]
    assert len(sizes) == 2
    assert sum(width * height for width, height in sizes) <= gallery.SECTION_PIXELS
    assert all(abs(height / width - 4 / 3) < 0.01 for width, height in sizes)


def diffusion_charts(folder: Path, lines: list[dict]) -> list[str]:
    """What a screen reader says of the charts of a run that has this log of diffusion alone."""
    write_stage(folder, "diffusion", {"family": "diffusion"}, lines)
    return read(write_report(folder)).charts


def test_a_curriculum_is_drawn_over_time(full: Page):
    told = (
        "Stage of the curriculum. stage 8, log SNR −18.4 to 0.0: from 1 to 8 stage, 8 points",
        "Noise levels drawn. % of draws: from 12.5 to 100, 8 columns up to step 40; active range, at last log SNR",
        "Training loss of each cluster. loss / its first: from 0.007812 to 1, 8 columns up to step 40",
        "Loss on test latents, along the clusters. step 40: from 1 to 8, 8 points",
    )
    assert [each for each in told if not any(chart.startswith(each) for chart in full.charts)] == []
    assert "Clusters are parts of the noise levels" in full.words


@pytest.mark.parametrize("num_clusters", [1, 5, 20, 100])
def test_charts_do_not_grow_with_the_clusters(tmp_path: Path, num_clusters: int):
    charts = diffusion_charts(tmp_path, curriculum(num_clusters, stages=100))
    titles = [chart.partition(". ")[0] for chart in charts]
    wanted = ["Loss", "Stage of the curriculum", "Noise levels drawn", "Training loss of each cluster"]
    assert titles[:4] == wanted
    assert titles[4:] == [
        "Loss on test latents of each cluster" if num_clusters < 7 else "Loss on test latents, along the clusters",
        "mean logsnr",
        "samples per second",
    ]
    assert (tmp_path / "report.html").stat().st_size < 150_000


def test_a_run_without_stages_shows_one(tmp_path: Path):
    lines = [line | {"curriculum/stage": 1} if "loss" in line else line for line in curriculum(5)]
    (chart,) = (chart for chart in diffusion_charts(tmp_path, lines) if chart.startswith("Stage"))
    assert "from 1 to 1 stage, 2 points" in chart


def test_a_log_of_earlier_versions_still_makes_a_report(tmp_path: Path):
    charts = diffusion_charts(tmp_path, curve("loss", "loss_quarter_1", "loss_quarter_4"))
    assert "Clusters" not in (tmp_path / "report.html").read_text()
    assert not any("curriculum" in chart or "cluster" in chart or "Noise" in chart for chart in charts)
    assert {chart.partition(". ")[0] for chart in charts} >= {"Loss", "loss quarter 1", "loss quarter 4"}


def test_samples_that_were_picked_are_told_as_such(full: Page):
    half, quarter = (full.words.index(f"transformer, best {share}\u00a0% of its candidates") for share in (50, 25))
    assert full.words.index("Real images against") < half < quarter < full.words.index("stranger")
    assert "odd@accept1e9" in full.words
    (card,) = re.findall(r"Class accuracy([\d.]+)", full.words)[:1]
    assert card == "95.0"  # the headline is of all samples
    assert "that picks the best candidates, and judges nothing, was trained" in full.words
    assert "Both learned from the same images, so they err alike" in full.words
    assert "autoregressive vim.block2; untrained 85.0\u00a0%; raw pixels 80.0\u00a0%" in full.words


def test_headings_go_down_one_level_at_a_time(full: Page):
    assert full.headings[0] == 1 and full.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(full.headings))


def test_text_of_a_run_is_never_markup(full: Page):
    assert EVIL in full.words  # as a class name, in a protocol and in the configuration
    assert EVIL in {name for image in full.images for name in re.findall(r"class (.*), seed", image["alt"])}


def test_a_page_is_small(tmp_path: Path):
    assert write_report(make_run(tmp_path / "zoo")).stat().st_size < 400_000


def test_without_labels_there_is_a_plain_grid(tmp_path: Path):
    page = read(write_report(make_run(tmp_path / "zoo", labels=False)))
    assert [image["alt"] for image in page.images][:2] == [f"Autoregressive transformer, seed {row}" for row in (0, 1)]
    assert not any("class" in image["alt"] for image in page.images)


@pytest.mark.parametrize("labels", [True, False])
def test_samples_of_texts_are_shown_with_them(tmp_path: Path, labels: bool):
    folder = make_run(tmp_path / "zoo", labels=labels)
    path = folder / "samples" / "diffusion" / "samples.json"
    told = json.loads(path.read_text())
    prompts = [EVIL, "a zebra", "", *(f"text {row}" for row in range(3, len(told["seeds"])))]
    write_json(path, {**told, "prompts": prompts})
    words = read(write_report(folder)).words
    assert all(text in words for text in prompts) and "no text" in words
    if not labels:
        assert f"{EVIL} \u00b7 a zebra \u00b7 no text \u00b7 text 3" in words


def test_the_sheet_of_restored_images_is_shown_among_the_samples(tmp_path: Path):
    folder = make_run(tmp_path / "zoo")
    name = "Latent diffusion: smaller images, samples and originals"
    assert name not in {image["alt"] for image in read(write_report(folder)).images}
    Image.new("RGB", (312, 1144), "green").save(folder / "eval" / "restored-diffusion.png")
    page = read(write_report(folder))
    assert name in {image["alt"] for image in page.images} and "spread evenly over the test images" in page.words


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("diffusion/model.json", "Latent diffusion: still in training|unfinished, step 45 of 90"),
        ("diffusion", "Latent diffusion: not trained yet|Not begun yet"),
        ("samples/diffusion", "Latent diffusion: trained, but no samples are drawn yet"),
        ("tokenizer/previews", "No previews of reconstructions yet"),
        ("tokenizer/metrics.jsonl", "its metrics.jsonl is missing"),
        ("codes", "No codes yet"),
        ("eval/probe.json", "No probe yet"),
        ("eval/metrics.json", "No scores yet"),
        ("stages.json", "No stage has ended yet"),
        ("config.yaml", "config.yaml is not there yet"),
    ],
)
def test_what_is_missing_is_said_in_words(tmp_path: Path, gone: str, said: str):
    folder = make_run(tmp_path / "zoo")
    if gone.startswith("diffusion"):
        (folder / "samples" / "diffusion").rename(tmp_path / "samples")
    (folder / gone).rename(tmp_path / "gone")
    words = read(write_report(folder)).words
    assert all(part in words for part in said.split("|"))


@pytest.mark.parametrize("rest", [b"", b"\xff\xfe{", b"[1, 2"])
def test_damaged_files_never_stop_a_report(tmp_path: Path, rest: bytes):
    folder = make_run(tmp_path / "zoo")
    for path in (path for path in list(folder.rglob("*")) if path.is_file()):
        path.write_bytes(rest)
    page = read(write_report(folder))
    assert "No scores yet" in page.words and not page.images


def test_an_empty_folder_makes_a_page_and_a_missing_one_an_error(tmp_path: Path):
    assert "No generator in this run so far" in read(write_report(tmp_path)).words
    with pytest.raises(ValueError, match="no such run folder"):
        write_report(tmp_path / "nowhere")


def test_large_pictures_are_shrunk(tmp_path: Path):
    folder = make_run(tmp_path / "zoo")
    noise = Image.effect_noise((256, 256), 80).convert("RGB")
    noise.save(tmp_path / "noise.png")
    for path in (folder / "samples").rglob("0*.png"):
        shutil.copy(tmp_path / "noise.png", path)
    assert write_report(folder).stat().st_size < 2_500_000


def test_a_grid_is_cut_back_into_its_pictures(tmp_path: Path):
    images = torch.randint(0, 255, (5, 3, SIZE, SIZE), dtype=torch.uint8)
    save_grid(images, tmp_path / "grid.png", columns=2)
    tiles = cut_grid(tmp_path / "grid.png", SIZE)
    assert np.array_equal(np.stack(tiles), images.permute(0, 2, 3, 1).numpy())
    assert cut_grid(tmp_path / "grid.png", SIZE - 1) == []


def test_an_overview_is_one_picture_below_300_kB(tmp_path: Path):
    path = save_overview(make_run(tmp_path / "zoo"), tmp_path / "docs" / "overview.png")
    assert path.stat().st_size < 300_000
    with Image.open(path) as picture:
        assert picture.width > 300
    with pytest.raises(ValueError, match="nothing to show yet"):
        save_overview(tmp_path / "docs", path)


def test_weights_are_counted_from_the_header(tmp_path: Path):
    make_run(tmp_path / "zoo")
    assert num_weights(tmp_path / "zoo" / "tokenizer" / "model.safetensors") == 20
