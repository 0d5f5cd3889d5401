"""Scores of a tokenizer on the test split: pixels, perception, codebook, and the distance to the very originals."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from engine.device import Device
from engine.images import ImageSet
from eval.judge import data_facts, reconstruction_distances
from eval.panel import Panel
from eval.pictures import Pictures, draw_indices, drawn
from eval.protocol import Record, protocol, record
from eval.reconstruction import batch_usage, code_counts, lpips_distance, perplexity, psnr, ssim, usage
from eval.standard import see_standard
from eval.statistics import Estimate, mean_of
from tokenizer.model import Tokenizer
from tokenizer.perceptual import LEAST_SIDE, TRUNKS, check_size, lpips_trunk, open_lpips

SETTINGS = {
    "psnr": {"range": 255, "over": "images"},
    "ssim": {"range": 255, "window": "Gaussian 11 x 11, sigma 1.5, inside the image", "over": "channels, images"},
    "usage": {"over": "all images together"},
    "usage_256": {"over": "batches of 256 images"},
}


def score_tokenizer(tokenizer: Tokenizer, test_set: ImageSet, panel: Panel, *, weights: str) -> list[Record]:
    """psnr, ssim, lpips_<net>, usage, usage_256, perplexity, rfid | rfd_<features>; `weights` says EMA or raw.

    Every process must call it; all but the first get an empty list.

    Raises:
        ValueError: eval.lpips names a network whose trunk weights are missing, or for which the images are too small.
    """
    config, device = panel.config, panel.device
    nets = {
        f"lpips_{net}": load_lpips(net, device.device)
        for net in lpips_nets(config.lpips, test_set.size, tell=device.is_main)
    }
    indices = draw_indices(np.arange(len(test_set)), config.num_reconstructions, seed=0)
    originals = drawn(test_set, indices, name="originals")
    pairs = Pairs(tokenizer, nets, originals, device)
    standard, made = see_standard(originals, panel), panel.see(pairs.reconstructions)
    real = standard.seen
    assert real is not None
    pairs.collect()
    if not device.is_main:
        return []
    facts = {
        **data_facts(test_set),
        "subject": {"tokenizer": tokenizer.fingerprint, "weights": weights, "rounding": "halves round up"},
    }
    records = []
    for name, estimate in pairs.scores().items():
        stated = protocol(**facts, num_real=real.count, reference=real.pixels, settings=SETTINGS.get(name))
        records.append(record(name, "tokenizer", estimate, n=real.count, protocol=stated))
    return records + reconstruction_distances(made, standard, panel.extractors, facts=facts)


def lpips_nets(wish: str, image_size: int | None = None, *, tell: bool = True) -> list[str]:
    """Which LPIPS networks to measure with; `auto` takes those whose weights are there and that can judge the images,
    and, if it is to `tell`, says so of the others.

    Raises:
        ValueError: it names a network that cannot judge images of so many pixels along each side.
    """
    if wish == "none":
        return []
    if wish != "auto":
        if image_size is not None:
            check_size(wish, image_size, setting="eval.lpips=", remedy="set eval.lpips=none")
        return [wish]
    there = [net for net in TRUNKS if lpips_trunk(net).is_file()]
    if not there and tell:
        print(f"lpips left out: no trunk weights in {lpips_trunk('vgg').parent} ({', '.join(TRUNKS.values())})")
    small = [net for net in there if image_size is not None and image_size < LEAST_SIDE[net]]
    if small and tell:
        told = ", ".join(f"{net} ({LEAST_SIDE[net]})" for net in small)
        print(f"lpips left out: images of {image_size} pixels are too small for {told}")
    return [net for net in there if net not in small]


def load_lpips(net: str, device: torch.device) -> nn.Module:
    """The LPIPS network that eval.lpips names, its trunk read from `lpips_trunk(net)`, never downloaded.

    Raises:
        ValueError: the trunk's file is not there.
    """
    remedy = "put torchvision's file there, or set eval.lpips=none"
    return open_lpips(net, lpips_trunk(net), asked=f"eval.lpips={net}", remedy=remedy).to(device)


class Pairs:
    """Reconstructs images as they pass by, and keeps how near each pair is and which codes were used."""

    def __init__(self, tokenizer: Tokenizer, nets: dict[str, nn.Module], originals: Pictures, device: Device) -> None:
        self.tokenizer, self.nets, self.originals, self.device = tokenizer, nets, originals, device
        self.values: dict[str, dict[int, Tensor]] = {}
        self.codes: dict[int, Tensor] = {}

    @property
    def reconstructions(self) -> Pictures:
        """The originals, reconstructed; each that is loaded is measured."""
        return Pictures(name="reconstructions", count=self.originals.count, load=self._load)

    def _load(self, start: int, stop: int) -> Tensor:
        images = self.originals.load(start, stop).to(self.device.device)
        made, codes = self.tokenizer.reconstruct(images)  # [B, 3, H, W], [B, T]
        if codes is not None:
            self.codes[start] = self.tokenizer.quantizer.distinct(codes).cpu()
        self._keep("psnr", start, psnr(images, made))
        if min(images.shape[2:]) >= 11:
            self._keep("ssim", start, ssim(images, made))
        for name, network in self.nets.items():
            self._keep(name, start, lpips_distance(network, images, made))
        return made.cpu()

    def collect(self) -> None:
        """Take over what the other processes have measured (collective)."""
        self.codes = dict(sorted(self.device.collect(list(self.codes.items()))))
        names = list(self.values)
        self.values = {
            name: dict(sorted(self.device.collect(list(self.values.get(name, {}).items()))))
            for name in dict.fromkeys(self.device.collect(names))
        }

    def scores(self) -> dict[str, Estimate]:
        """Means over images, then the use of the codebook, if there is one."""
        found = {name: mean_of(torch.cat(list(rows.values()))) for name, rows in self.values.items()}
        if not self.codes:
            return found
        codes = torch.cat(list(self.codes.values()))
        num_codes = self.tokenizer.vocab_size * self.tokenizer.quantizer.codes_per_token
        counts, shares = code_counts(codes, num_codes), batch_usage(codes, num_codes)
        found["usage"] = Estimate(usage(counts), None)
        found["perplexity"] = Estimate(perplexity(counts), None)
        if len(shares):
            found["usage_256"] = mean_of(shares)
        else:
            print(f"usage_256 left out: {len(codes)} test images do not fill a batch of 256")
        return found

    def _keep(self, name: str, start: int, values: Tensor) -> None:
        self.values.setdefault(name, {})[start] = values.cpu()
