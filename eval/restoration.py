"""Scores of restored images: samples of smaller test images against the test images, beside mere enlargement.

A sheet shows some of them: the smaller image, the sample that was drawn from it, and the original.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from engine.device import Device, exact_products
from engine.images import ImageSet
from engine.log import progress
from engine.shards import Shards
from eval.config import EvalConfig
from eval.generator_scores import sampling_facts, weights_kind
from eval.judge import data_facts
from eval.panel import Panel
from eval.pictures import Pictures, drawn, numbered
from eval.protocol import Record, protocol, record
from eval.reconstruction import lpips_distance, psnr, ssim
from eval.sample_sets import Drawn
from eval.sheets import save_sheet
from eval.statistics import mean_of
from eval.subject import Subject
from eval.tokenizer_scores import SETTINGS, load_lpips, lpips_nets
from generator.config import DiffusionConfig
from generator.sample_folder import read_samples
from tokenizer.encode import open_codes
from tokenizer.smaller import shrink, smaller_version

ENLARGED = "enlarged"  # the subject of smaller images that no model restored
SSIM_SIDE = 11  # SSIM's window, which images must hold
BLOCK = 64  # images that a process measures at a time
SHOWN = 10  # lines of the sheet


class Measured(NamedTuple):
    """How near images are to the originals, [N] by score, and a hash of the originals' pixels."""

    values: dict[str, Tensor]
    originals: str


def check_enough_test(config: EvalConfig, diffusion: DiffusionConfig | None, test_set: ImageSet) -> None:
    """Raise ValueError if more samples are to be scored than there are smaller test images to draw them from."""
    if diffusion is None or diffusion.condition.kind != "image" or config.num_samples <= len(test_set):
        return
    raise ValueError(
        f"eval.num_samples={config.num_samples}: with diffusion.condition.kind=image each sample is of another test"
        f" image, and the test split has {len(test_set)}; set --eval.num_samples={len(test_set)} or less"
    )


def score_restorations(subject: Subject, folders: Sequence[Drawn], panel: Panel) -> list[Record]:
    """psnr, ssim and lpips_<net> of samples whose conditions were smaller test images, against these test images.

    Beside them, as the subject `enlarged`, the same of the smaller images as they are, bicubically enlarged. Samples of
    other conditions have no originals, so none of these scores. Some of each are drawn in eval/restored-<subject>.png.
    Every process must call it; all but the first get an empty list.

    Raises:
        ValueError: the codes of the test split are missing or of other images.
    """
    test_set, device, num = subject.test_set, panel.device, panel.config.num_samples
    restored = [(each, told) for each in folders if "images" in (told := read_samples(each.folder) or {})]
    if not restored:
        return []
    codes = open_codes(subject.run, "test", subject.tokenizer)
    factor, indices = codes.meta["low_resolution"], readable(test_set, codes)
    found = lpips_nets(panel.config.lpips, test_set.size, tell=False)
    nets = {f"lpips_{net}": load_lpips(net, device.device) for net in found}
    records: list[Record] = []
    for number, ((sampling, folder), told) in enumerate(restored):
        name, rows = sampling.subject, np.array(told["images"][:num])
        originals = drawn(test_set, indices[rows], name="originals")
        samples = numbered(folder, len(rows), size=test_set.size, name=name)
        facts = sampling_facts(told, torch.tensor(told["labels"][:num]), weights_kind(sampling.config))
        made: list[tuple[Pictures, dict[str, Any]]] = [(samples, facts)]
        if number == 0:
            made.append((enlarged(originals, factor), {}))
        for pictures, stated in made:
            measured = measure(pictures, originals, nets, device)
            records += _records(pictures.name, measured, factor=factor, facts={**data_facts(test_set), **stated})
            if device.is_main and pictures is samples:
                sheet = subject.run.folder / "eval" / f"restored-{name}.png"
                write_sheet(sheet, samples, originals, measured.values["psnr"], rows, factor)
                print(f"smaller images, samples and originals: {sheet}")
    return records if device.is_main else []


def write_sheet(
    path: Path, made: Pictures, originals: Pictures, likeness: Tensor, rows: np.ndarray, factor: int
) -> None:
    """Write `path` (PNG): on each line a smaller image, the sample that was drawn from it, and the original.

    The lines are spread evenly over all samples. `likeness` [N] is their PSNR in dB, `rows` [N] are the numbers of the
    originals in the test split.
    """
    lines, shown = [], min(SHOWN, originals.count)
    for place in (np.arange(shown) * originals.count // shown).tolist():
        original = originals.load(place, place + 1)  # [1, 3, H, W]
        small, sample = shrink(original, factor)[0], made.load(place, place + 1)[0]
        words = f"{small.shape[2]} x {small.shape[1]} pixels", f"{likeness[place]:.1f} dB", f"test {rows[place]}"
        lines.append(list(zip((small, sample, original[0]), words, strict=True)))
    save_sheet(path, lines)


def readable(test_set: ImageSet, codes: Shards) -> np.ndarray:
    """The index in the test split of each row of its codes, int64 [n]: unreadable images are left out of these.

    Raises:
        ValueError: there are not as many as rows.
    """
    if len(codes) == len(test_set):
        return np.arange(len(test_set))
    found = torch.cat([batch["indices"] for batch in test_set.in_order(BLOCK)]).numpy()
    if len(found) != len(codes):
        told = f"{codes.folder} has {len(codes)} rows, but {len(found)} test images can be read"
        raise ValueError(f"{told}: run `tokenloom encode` again")
    return found


def enlarged(originals: Pictures, factor: int) -> Pictures:
    """Smaller versions of images, as large as these."""
    return Pictures(
        name=ENLARGED,
        count=originals.count,
        load=lambda start, stop: smaller_version(originals.load(start, stop), factor),
    )


def measure(made: Pictures, originals: Pictures, nets: Mapping[str, nn.Module], device: Device) -> Measured:
    """Hold images against their originals, in pairs; every process must call it, and measures its share."""
    starts = range(0, originals.count, BLOCK)[device.rank :: device.world]
    total, parts = sum(min(BLOCK, originals.count - start) for start in starts), []
    bar = progress(total=total, title=f"restored/{made.name}", unit="image", enabled=device.is_main)
    with torch.inference_mode(), exact_products(), bar:
        for start in starts:
            stop = min(start + BLOCK, originals.count)
            images, truth = made.load(start, stop), originals.load(start, stop)  # [n, 3, H, W] each
            pixels = hashlib.sha256(truth.numpy().tobytes()).hexdigest()
            parts.append((start, pixels, _likeness(images.to(device.device), truth.to(device.device), nets)))
            bar.update(stop - start)
    parts = sorted(device.collect(parts), key=lambda part: part[0])
    values = {name: torch.cat([found[name] for _, _, found in parts]) for name in parts[0][2]}
    return Measured(values, hashlib.sha256("".join(pixels for _, pixels, _ in parts).encode()).hexdigest()[:16])


def _likeness(images: Tensor, others: Tensor, nets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Every score of each pair, [B] on the CPU."""
    found = {"psnr": psnr(images, others)}
    if min(images.shape[2:]) >= SSIM_SIDE:
        found["ssim"] = ssim(images, others)
    found |= {name: lpips_distance(network, images, others) for name, network in nets.items()}
    return {name: values.cpu() for name, values in found.items()}


def _records(subject: str, measured: Measured, *, factor: int, facts: Mapping[str, Any]) -> list[Record]:
    """The mean of each score; the factor is among its settings, which tells it from a tokenizer's of the same name."""
    records = []
    known: Mapping[str, Any] = SETTINGS
    for name, values in measured.values.items():
        count, settings = len(values), {**known.get(name, {}), "low_resolution": factor}
        stated = protocol(**facts, num_real=count, reference=measured.originals, settings=settings)
        records.append(record(name, subject, mean_of(values), n=count, protocol=stated))
    return records
