"""CNN towers of VQGAN: pixels to one vector per token, and back (arXiv 2012.09841).

Residual blocks at falling resolutions, attention over the whole map in the middle; the decoder mirrors the encoder with
one block more at each resolution. A projection of each token (VQGAN's 1x1 convolution) stands on either side of the
bottleneck. Feature maps lie in memory as planes, [B, C, H, W]: on a CPU the group norm's backward pass takes up to 20
times as long in the channels-last layout, and a whole training step 1.3 times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from engine.attention import attention
from tokenizer.config import CnnConfig

GROUPS, GROUP_WIDTH = 32, 4  # most groups of a norm, fewest channels of a group
EPSILON = 1e-6


class CnnEncoder(nn.Module):
    """Images in [-1, 1] -> one code-sized vector per token, in raster order.

    Attributes:
        depth: number of stages, one for each resolution and one for the middle.

    Raises:
        ValueError: the image cannot be halved so often, or no feature map has a side named in `config.attention`.
    """

    def __init__(self, config: CnnConfig, *, image_size: int, out_dim: int) -> None:
        super().__init__()
        self.depth = len(config.multipliers) + 1
        self.embed = convolution(3, config.channels)
        self.stages = encoder_stages(config, image_size)
        self.norm = norm(config.channels * config.multipliers[-1])
        self.head = convolution(config.channels * config.multipliers[-1], out_dim)
        self.project = nn.Linear(out_dim, out_dim)

    def forward(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] -> [B, T, out_dim]."""
        for hidden in self.feature_maps(images):
            last = hidden
        return self._tokens_out(last)

    def hidden(self, images: Tensor) -> Iterator[Tensor]:
        """One token per pixel of each feature map, in raster order, [B, T', C]."""
        return map(to_tokens, self.feature_maps(images))

    def feature_maps(self, images: Tensor) -> Iterator[Tensor]:
        """Feature maps [B, C, H', W']: of the first convolution, then after each stage in turn."""
        hidden = self.embed(images.contiguous())  # [B, C, H, W]
        yield hidden
        for stage in self.stages:
            hidden = stage(hidden)
            yield hidden

    def out(self, hidden: Tensor) -> Tensor:
        """From the last of `hidden` to what `forward` gives, [B, T, C] -> [B, T, out_dim]."""
        return self._tokens_out(to_map(hidden, math.isqrt(hidden.shape[1])))

    def _tokens_out(self, last: Tensor) -> Tensor:
        return self.project(to_tokens(self.head(F.silu(self.norm(last)))))  # [B, T, out_dim]


class CnnDecoder(nn.Module):
    """One code vector per token -> images, nominally in [-1, 1] but not clamped; or more channels of them.

    Raises:
        ValueError: as for the encoder.
    """

    def __init__(self, config: CnnConfig, *, image_size: int, in_dim: int, out_channels: int = 3) -> None:
        super().__init__()
        self.side = sides(config, image_size)[-1]
        self.project = nn.Linear(in_dim, in_dim)
        self.embed = convolution(in_dim, config.channels * config.multipliers[-1])
        self.stages = decoder_stages(config, image_size)
        self.norm = norm(config.channels * config.multipliers[0])
        self.head = convolution(config.channels * config.multipliers[0], out_channels)

    @property
    def last_layer(self) -> Tensor:
        """The weight of the last convolution, a parameter."""
        return self.head.weight

    def forward(self, vectors: Tensor) -> Tensor:
        """[B, T, in_dim] -> float [B, out_channels, H, W]."""
        hidden = self.embed(to_map(self.project(vectors), self.side))  # [B, C, h, w]
        for stage in self.stages:
            hidden = stage(hidden)
        return self.head(F.silu(self.norm(hidden)))  # [B, out_channels, H, W]


def encoder_stages(config: CnnConfig, image_size: int) -> nn.ModuleList:
    """Residual blocks at each resolution, finest first, then the middle."""
    stages, width = nn.ModuleList(), config.channels
    for side, multiplier in zip(sides(config, image_size), config.multipliers, strict=True):
        halve = [Downsample(width)] if stages else []
        blocks = residual_blocks(width, config.channels * multiplier, config.res_blocks, side in config.attention)
        stages.append(nn.Sequential(*halve, *blocks))
        width = config.channels * multiplier
    return stages.append(middle(width))


def decoder_stages(config: CnnConfig, image_size: int) -> nn.ModuleList:
    """The middle, then residual blocks at each resolution, coarsest first."""
    width = config.channels * config.multipliers[-1]
    stages = nn.ModuleList([middle(width)])
    for side, multiplier in zip(sides(config, image_size)[::-1], config.multipliers[::-1], strict=True):
        double = [Upsample(width)] if len(stages) > 1 else []
        blocks = residual_blocks(width, config.channels * multiplier, config.res_blocks + 1, side in config.attention)
        stages.append(nn.Sequential(*double, *blocks))
        width = config.channels * multiplier
    return stages


def sides(config: CnnConfig, image_size: int) -> list[int]:
    """Pixels along a side of the feature map at each resolution, finest first."""
    if image_size % config.patch_size:
        told = f"data.size={image_size}, model.cnn.multipliers={list(config.multipliers)}"
        raise ValueError(f"{told}: the CNN halves the image to 1/{config.patch_size}; give a size divisible by that")
    found = [image_size >> level for level in range(len(config.multipliers))]
    if not set(config.attention) <= set(found):
        told = f"model.cnn.attention={list(config.attention)}"
        raise ValueError(f"{told}: the feature maps have sides of {', '.join(map(str, found))}; choose among them")
    return found


def residual_blocks(before: int, width: int, number: int, attends: bool) -> list[nn.Module]:
    """Residual blocks from `before` to `width` channels, each followed by attention if the map attends."""
    blocks: list[nn.Module] = []
    for each in range(number):
        blocks.append(ResidualBlock(width if each else before, width))
        if attends:
            blocks.append(SelfAttention(width))
    return blocks


def middle(width: int) -> nn.Sequential:
    """Where the whole map is seen at once."""
    return nn.Sequential(ResidualBlock(width, width), SelfAttention(width), ResidualBlock(width, width))


class ResidualBlock(nn.Module):
    """Two convolutions, each after a norm and SiLU, added to the input."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(before), convolution(before, width)
        self.norm2, self.conv2 = norm(width), convolution(width, width)
        self.shortcut = nn.Conv2d(before, width, kernel_size=1) if before != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, H, W] -> [B, width, H, W]."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class SelfAttention(nn.Module):
    """Every pixel of a map attends to all others, by one head; added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = norm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> alike."""
        query, key, value = self.qkv(to_tokens(self.norm(x))).unsqueeze(1).chunk(3, dim=-1)  # [B, 1, T, C]
        mixed = attention(query, key, value).squeeze(1)  # [B, T, C]
        return x + to_map(self.project(mixed), x.shape[-1])


class Downsample(nn.Module):
    """Halve the resolution by a convolution; the zeros around the map stand at its right and lower edge only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H / 2, W / 2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution by repeating each pixel, then smooth by a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = convolution(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2 H, 2 W]."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def convolution(before: int, width: int) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps the resolution."""
    return nn.Conv2d(before, width, kernel_size=3, padding=1)


def norm(width: int) -> nn.GroupNorm:
    """A group norm of 32 groups, or of the most below that divide the channels into groups of four or more.

    VQGAN has 32 groups of 4 or more. In groups of one, as 32 groups of 16 or 32 channels would be, every channel would
    lose its mean over the image, and the decoder its colours.
    """
    most = max(1, min(GROUPS, width // GROUP_WIDTH))
    return nn.GroupNorm(max(number for number in range(1, most + 1) if width % number == 0), width, eps=EPSILON)


def to_tokens(maps: Tensor) -> Tensor:
    """Pixels of feature maps in raster order: [B, C, h, w] -> [B, h w, C]."""
    return maps.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, side: int) -> Tensor:
    """Inverse of `to_tokens` for square maps: [B, T, C] -> [B, C, side, side]."""
    return tokens.transpose(1, 2).contiguous().unflatten(2, (side, side))
