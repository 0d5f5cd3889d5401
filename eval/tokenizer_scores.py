"""Scores of a tokenizer on the test split: pixels, perception, codebook, and the distance to the very originals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from engine.images import ImageSet
from eval.config import EvalConfig
from eval.features import Extractor
from eval.judge import data_facts, draw_indices, drawn_batches, judge, reconstruction_distances
from eval.protocol import Record, protocol, record
from eval.reconstruction import batch_usage, code_counts, lpips_distance, perplexity, psnr, ssim, usage
from eval.statistics import Estimate, mean_of
from tokenizer.model import Tokenizer
from tokenizer.perceptual import TRUNKS, lpips_trunk, open_lpips


def score_tokenizer(
    tokenizer: Tokenizer,
    test_set: ImageSet,
    extractors: Sequence[Extractor],
    *,
    config: EvalConfig,
    device: torch.device,
    weights: str,
) -> list[Record]:
    """psnr, ssim, lpips_<net>, usage, usage_256, perplexity, rfid | rfd_<features>; `weights` says EMA or raw.

    Raises:
        ValueError: eval.lpips names a network whose trunk weights are missing.
    """
    nets = {f"lpips_{net}": load_lpips(net, device) for net in lpips_nets(config.lpips)}
    indices = draw_indices(np.arange(len(test_set)), config.num_reconstructions, seed=0)

    def originals() -> Iterator[Tensor]:
        return (batch["images"] for batch in drawn_batches(test_set, indices, config.batch_size))

    pairs = Pairs(tokenizer, nets, device)
    real = judge(extractors, originals(), device=device)
    made = judge(extractors, pairs.through(originals()), device=device, total=len(indices), title="reconstructions")
    facts = {
        **data_facts(test_set),
        "subject": {"tokenizer": tokenizer.fingerprint, "weights": weights},
    }
    stated = protocol(**facts, num_real=real.n, reference=real.pixels)
    scores = pairs.scores().items()
    records = [record(name, "tokenizer", estimate, n=real.n, protocol=stated) for name, estimate in scores]
    return records + reconstruction_distances(made, real, extractors, facts=facts)


def lpips_nets(wish: str) -> list[str]:
    """Which LPIPS networks to measure with; `auto` takes those whose weights are there, and says so of the others."""
    if wish == "none":
        return []
    if wish != "auto":
        return [wish]
    there = [net for net in TRUNKS if lpips_trunk(net).is_file()]
    if not there:
        print(f"lpips left out: no trunk weights in {lpips_trunk('vgg').parent} ({', '.join(TRUNKS.values())})")
    return there


def load_lpips(net: str, device: torch.device) -> nn.Module:
    """The LPIPS network that eval.lpips names, its trunk read from `lpips_trunk(net)`, never downloaded.

    Raises:
        ValueError: the trunk's file is not there.
    """
    remedy = "put torchvision's file there, or set eval.lpips=none"
    return open_lpips(net, lpips_trunk(net), asked=f"eval.lpips={net}", remedy=remedy).to(device)


class Pairs:
    """Reconstructs images as they pass by, and keeps how near each pair is and which codes were used."""

    def __init__(self, tokenizer: Tokenizer, nets: dict[str, nn.Module], device: torch.device) -> None:
        self.tokenizer, self.nets, self.device = tokenizer, nets, device
        self.values: dict[str, list[Tensor]] = {}
        self.codes: list[Tensor] = []

    def through(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """uint8 originals [B, 3, H, W] -> their reconstructions, alike."""
        for images in batches:
            moved = images.to(self.device)
            made, codes = self.tokenizer.reconstruct(moved)             # [B, 3, H, W], [B, T]
            if codes is not None:
                self.codes.append(codes.cpu())
            self._keep("psnr", psnr(moved, made))
            if min(images.shape[2:]) >= 11:
                self._keep("ssim", ssim(moved, made))
            for name, network in self.nets.items():
                self._keep(name, lpips_distance(network, moved, made))
            yield made.cpu()

    def scores(self) -> dict[str, Estimate]:
        """Means over images, then the use of the codebook, if there is one."""
        found = {name: mean_of(torch.cat(rows)) for name, rows in self.values.items()}
        if not self.codes:
            return found
        codes, vocab_size = torch.cat(self.codes), self.tokenizer.vocab_size
        counts, shares = code_counts(codes, vocab_size), batch_usage(codes, vocab_size)
        found["usage"] = Estimate(usage(counts), None)
        found["perplexity"] = Estimate(perplexity(counts), None)
        if len(shares):
            found["usage_256"] = mean_of(shares)
        else:
            print(f"usage_256 left out: {len(codes)} test images do not fill a batch of 256")
        return found

    def _keep(self, name: str, values: Tensor) -> None:
        self.values.setdefault(name, []).append(values.cpu())
