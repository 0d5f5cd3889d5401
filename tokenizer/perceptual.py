"""Distances between images in the features of a trained network: LPIPS, or any timm network with a local file."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.pretrained import checkpoint_folder, fill_trunk, open_timm, timm_parts

KEY = "tokenizer.loss.perceptual_network"
TRUNKS = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
LEAST_SIDE = {"alex": 31, "vgg": 16, "squeeze": 17}  # pixels; of smaller images nothing would reach the last stage
PERCEPTUAL_PASSES = 1.5  # forward passes of a pair that a training step costs: both forwards, one back to its pixels


def open_perceptual(spec: str, *, image_size: int | None = None, blank: bool = False) -> nn.Module:
    """The distance that loss.perceptual_network names: (images, target), both [B, 3, H, W] in [-1, 1] -> float32 [B].

    Frozen, in eval mode, differentiable with respect to the images. Opening it leaves the random numbers alone.

    Args:
        spec: lpips:<net>[:<trunk file>] or timm:<model>:<weights file>[:<input size>].
        image_size: pixels along each side of the images, to be told now if LPIPS cannot judge images so small.
        blank: without the weights, for counting; an LPIPS trunk need not be there, but timm's file must.

    Raises:
        ValueError: an unknown network, too small images, or weights that are missing or do not fit; says where they
            were looked for.
    """
    kind, _, rest = spec.partition(":")
    name, _, file = rest.partition(":")
    if kind == "lpips" and name in TRUNKS:
        if image_size is not None:
            check_size(name, image_size, setting=f"{KEY}=lpips:", remedy="set tokenizer.loss.perceptual=0")
        if blank:
            return Lpips(name, None)
        remedy = f"give a file, {KEY}=lpips:{name}:FILE, or set tokenizer.loss.perceptual=0"
        return open_lpips(name, Path(file) if file else lpips_trunk(name), asked=f"{KEY}={spec}", remedy=remedy)
    if kind == "timm" and file:
        return TimmDistance(*timm_parts(rest), blank=blank)
    known = ", ".join(f"lpips:{net}" for net in TRUNKS)
    raise ValueError(
        f"{KEY}={spec!r} is unknown: use {known} (with :<trunk file> if it is not in torch hub's folder), or "
        "timm:<model>:<weights file>[:<input size>]"
    )


def lpips_trunk(net: str) -> Path:
    """Where the trunk of LPIPS is looked for: torch hub's checkpoint folder, under torchvision's file name."""
    return checkpoint_folder() / TRUNKS[net]


def check_size(net: str, image_size: int, *, setting: str, remedy: str) -> None:
    """Raise ValueError if an LPIPS network cannot judge images of so many pixels along each side.

    Args:
        setting: what asked for it, but for the network's name; for the message, as is `remedy`.
    """
    if image_size < LEAST_SIDE[net]:
        fitting = [f"use {setting}{other}, " for other, least in LEAST_SIDE.items() if least <= image_size]
        told = f"{setting}{net} needs images of at least {LEAST_SIDE[net]} pixels along each side"
        raise ValueError(f"{told}, but data.size={image_size}: {''.join(fitting[:1])}raise data.size, or {remedy}")


def open_lpips(net: str, trunk: Path, *, asked: str, remedy: str) -> Lpips:
    """LPIPS with its trunk read from a local file, never downloaded.

    Args:
        asked, remedy: the setting that asked for it, and what can be done without the file; for the message.

    Raises:
        ValueError: the trunk's file is not there, or is another network's.
    """
    if not trunk.is_file():
        raise ValueError(f"{asked}: no trunk weights at {trunk.absolute()}; {remedy}")
    return Lpips(net, trunk)


class FeatureDistance(nn.Module):
    """Squared differences of unit feature vectors, averaged over places, summed over channels and stages of a network.

    A subclass says what the stages are. Features are compared in float32, whatever they are computed in.
    """

    def stages(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] in [-1, 1] -> feature maps [B, C, h, w], each of its own size."""
        raise NotImplementedError

    def over_channels(self, stage: int, squares: Tensor) -> Tensor:
        """Squared differences [B, C, h, w] of one stage -> [B, h, w]."""
        return squares.sum(dim=1)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Both [B, 3, H, W] in [-1, 1] -> float32 [B]."""
        pairs = list(zip(self.stages(images), self.stages(target), strict=True))
        total = torch.zeros(len(images), device=images.device)
        with torch.autocast(images.device.type, enabled=False):
            for stage, (features, wanted) in enumerate(pairs):
                squares = (unit(features) - unit(wanted)).square()  # [B, C, h, w]
                total = total + self.over_channels(stage, squares).mean(dim=(1, 2))
        return total


class Lpips(FeatureDistance):
    """Learned perceptual image patch similarity (Zhang et al. 2018, arXiv 1801.03924), version 0.1, of package lpips.

    Its channels are weighted as people judged; these weights come with the package.
    """

    def __init__(self, net: str, trunk: Path | None) -> None:
        super().__init__()
        import lpips

        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # lpips calls torchvision in a way that is going out of use
            self.network = lpips.LPIPS(net=net, version="0.1", pnet_rand=True, verbose=False)
        if trunk is not None:
            fill_trunk(self.network.net, trunk)
        self.eval().requires_grad_(False)

    def stages(self, images: Tensor) -> list[Tensor]:
        return list(self.network.net(self.network.scaling_layer(images)))

    def over_channels(self, stage: int, squares: Tensor) -> Tensor:
        return self.network.lins[stage](squares).squeeze(1)


class TimmDistance(FeatureDistance):
    """The feature maps of a timm network, all stages of a CNN or all blocks of a ViT, every channel alike.

    Images keep their size if the network takes any, and no other is given; else they are resized (bicubic). A blank one
    has random weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: str, path: Path, size: int | None, *, blank: bool = False) -> None:
        super().__init__()
        remedy = "; give one, or set tokenizer.loss.perceptual=0"
        with torch.random.fork_rng(devices=[]):
            self.network, settings = open_timm(model, path, size, key=KEY, remedy=remedy, blank=blank)
        if not hasattr(self.network, "forward_intermediates"):
            raise ValueError(f"{KEY}=timm:{model}: timm gives no intermediate features of it; choose another model")
        self.size = size or (settings["input_size"][-1] if settings.get("fixed_input_size") else None)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(settings[name]).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def stages(self, images: Tensor) -> list[Tensor]:
        x = images
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        x = ((x + 1) / 2 - self.mean) / self.std
        return self.network.forward_intermediates(x, intermediates_only=True)


def unit(features: Tensor) -> Tensor:
    """Every place's feature vector at length 1, in float32; [B, C, h, w] -> alike. Vectors of zeros stay zeros."""
    return F.normalize(features.float(), dim=1, eps=1e-10)
