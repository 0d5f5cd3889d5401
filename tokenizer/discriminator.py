"""The opponents in the adversarial loss: StyleGAN2's residual discriminator and PatchGAN, in plain PyTorch.

Neither has buffers that change, nor statistics over the batch, except StyleGAN2's minibatch deviation, which is
taken within groups of neighbours.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.config import DiscriminatorConfig

BLUR = (1.0, 3.0, 3.0, 1.0)
GROUP = 4  # images over which the minibatch deviation is taken


def build_discriminator(config: DiscriminatorConfig, image_size: int) -> nn.Module:
    """The network that the section `discriminator` describes: images [B, 3, H, W] in [-1, 1] -> logits [B, ...].

    Raises:
        ValueError: images of this size do not suit it.
    """
    if config.kind == "stylegan2":
        return StyleGan2Discriminator(image_size, channels=config.channels, channel_base=config.channel_base)
    least = 3 * 2**config.patch_layers
    if image_size < least:
        layers = int(math.log2(max(image_size, 3) / 3))
        remedy = f"discriminator.patch_layers={layers}" if layers else "larger images"
        raise ValueError(
            f"discriminator.patch_layers={config.patch_layers} needs images of at least {least} pixels, but "
            f"data.size={image_size}: use {remedy}"
        )
    return PatchDiscriminator(channels=config.patch_channels, layers=config.patch_layers)


class StyleGan2Discriminator(nn.Module):
    """The residual discriminator of StyleGAN2 (Karras et al. 2020, arXiv 1912.04958) without conditions.

    Colours to features at full resolution, residual blocks down to 4 x 4, the minibatch deviation as one more
    feature, a convolution and two linear layers. One logit per image.

    Args:
        image_size: a power of two of at least 8, so that halving leads to 4.
        channels: most channels at any resolution.
        channel_base: channels at resolution r are channel_base / r.
    """

    def __init__(self, image_size: int, *, channels: int, channel_base: int) -> None:
        super().__init__()
        if image_size < 8 or image_size & (image_size - 1):
            raise ValueError(
                f"discriminator.kind=stylegan2 halves images down to 4 pixels, so data.size={image_size} must be a "
                "power of two of at least 8; use another size, or discriminator.kind=patchgan"
            )
        sizes = [2**power for power in range(image_size.bit_length() - 1, 1, -1)]  # image_size ... 4
        widths = [max(1, min(channels, channel_base // size)) for size in sizes]
        self.from_rgb = EqualConv(3, widths[0], 1)
        self.blocks = nn.Sequential(*(ResidualBlock(*pair) for pair in itertools.pairwise(widths)))
        self.mix = EqualConv(widths[-1] + 1, widths[-1], 3)
        self.hidden = EqualLinear(16 * widths[-1], widths[-1])
        self.judge = EqualLinear(widths[-1], 1)

    def forward(self, images: Tensor, *, parts: int = 1) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> float32 [B, 1].

        Args:
            parts: equal parts, such as 2 for real images followed by made ones, that share no group of the minibatch
                deviation.
        """
        x = images.contiguous(memory_format=torch.channels_last)  # on a CPU the blurs are ten times faster so
        x = self.blocks(leaky(self.from_rgb(x)))  # [B, C, 4, 4]
        with torch.autocast(images.device.type, enabled=False):
            x = x.float()
            deviation = minibatch_deviation(x, group=group_size(len(x), parts))
            x = leaky(self.mix(torch.cat([x, deviation], dim=1)))  # [B, C, 4, 4]
            return self.judge(leaky(self.hidden(x.flatten(1))))


class ResidualBlock(nn.Module):
    """Two convolutions beside a skip, both halving the resolution behind a blur: [B, C, H, W] -> [B, C', H/2, W/2]."""

    blur: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.keep = EqualConv(inputs, inputs, 3)
        self.down = EqualConv(inputs, outputs, 3, stride=2)
        self.skip = EqualConv(inputs, outputs, 1, bias=False)
        row = torch.tensor(BLUR) / sum(BLUR)
        self.register_buffer("blur", row[:, None] * row, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # Blurred, then every second place; the skip has no need of the places between.
        skip = self.skip(blurred(x, self.blur, padding=1, stride=2))  # [B, C', H/2, W/2]
        x = blurred(leaky(self.keep(x)), self.blur, padding=2, stride=1)  # [B, C, H + 1, W + 1]
        # The sum of two independent terms has twice the variance: both are divided by sqrt(2).
        return leaky(self.down(x), gain=1.0) + skip * math.sqrt(0.5)


class EqualConv(nn.Module):
    """Convolution with equalised learning rate (Karras et al. 2018): normal weights, divided by sqrt(fan in) in use.

    Stride 1 keeps the size; stride 2 takes windows that lie inside.
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, size, size))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.stride, self.padding = stride, size // 2 if stride == 1 else 0
        self.scale = 1 / math.sqrt(inputs * size**2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        return F.conv2d(x, self.weight * self.scale, self.bias, self.stride, self.padding)


class EqualLinear(nn.Module):
    """Linear layer with equalised learning rate: normal weights, divided by sqrt(inputs) in use."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = 1 / math.sqrt(inputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, D']."""
        return F.linear(x * self.scale, self.weight, self.bias)


def leaky(x: Tensor, *, gain: float = math.sqrt(2)) -> Tensor:
    """Leaky ReLU of slope 0.2, times a gain that keeps the variance."""
    return F.leaky_relu(x, 0.2) * gain


def blurred(x: Tensor, kernel: Tensor, *, padding: int, stride: int) -> Tensor:
    """Every `stride`-th place of each channel, blurred by a kernel [4, 4]: [B, C, H, W] -> [B, C, H', W']."""
    channels = x.shape[1]
    weight = kernel.to(x.dtype).expand(channels, 1, *kernel.shape)
    return F.conv2d(x, weight, stride=stride, padding=padding, groups=channels)


def group_size(batch_size: int, parts: int) -> int:
    """The most images, up to 4, of which groups fill each of `parts` equal parts of a batch."""
    if batch_size % parts:
        raise ValueError(f"a batch of {batch_size} images has no {parts} equal parts: give as many real as made images")
    return next(size for size in range(GROUP, 0, -1) if batch_size // parts % size == 0)


def minibatch_deviation(x: Tensor, *, group: int) -> Tensor:
    """How much consecutive images differ, one number per group (Karras et al. 2018): [B, C, H, W] -> [B, 1, H, W].

    The standard deviation over the `group` images, averaged over channels and places; 0 for groups of one.
    """
    B, _, H, W = x.shape
    if group == 1:
        return x.new_zeros(B, 1, H, W)
    variance = x.unflatten(0, (-1, group)).var(dim=1, unbiased=False)  # [B / group, C, H, W]
    deviation = (variance + 1e-8).sqrt().mean(dim=(1, 2, 3))  # [B / group]
    return deviation.repeat_interleave(group)[:, None, None, None].expand(B, 1, H, W)


class PatchDiscriminator(nn.Module):
    """PatchGAN (pix2pix, Isola et al. 2017, as in VQGAN): a logit for each of many overlapping patches.

    4 x 4 convolutions, `layers` of them halving the resolution. GroupNorm instead of batch norm: statistics of a batch
    would make real and made images in it depend on each other, and on how it is cut into accumulated parts and among
    processes; R1 is a penalty of each image's own gradient, and means something only without them.

    Args:
        channels: of the first layer; they double with each further one, up to 8 times as many.
        layers: how many halve the resolution; images must be at least 3 x 2^layers pixels.
    """

    def __init__(self, *, channels: int, layers: int) -> None:
        super().__init__()
        widths = [channels * min(2**layer, 8) for layer in range(layers + 1)]
        stack: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer, (inputs, outputs) in enumerate(itertools.pairwise(widths), start=1):
            stride = 2 if layer < layers else 1
            stack += [nn.Conv2d(inputs, outputs, 4, stride=stride, padding=1, bias=False), group_norm(outputs)]
            stack += [nn.LeakyReLU(0.2)]
        self.features = nn.Sequential(*stack)
        self.judge = nn.Conv2d(widths[-1], 1, 4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, *, parts: int = 1) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> float32 [B, 1, h, w]. Images are judged alone, so `parts` changes nothing."""
        x = self.features(images.contiguous(memory_format=torch.channels_last))  # [B, C, h + 1, w + 1]
        with torch.autocast(images.device.type, enabled=False):
            return self.judge(x.float())


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups, or of as many as divide both 32 and the channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels)
