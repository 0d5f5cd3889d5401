"""The `tokenizer` section of an experiment: networks, bottleneck, losses, opponent, training. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from engine.config import TrainConfig, difference, to_dict


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    blocks: int
    """Transformer blocks."""
    width: int
    """Features per token."""
    heads: int
    """Attention heads; they divide the width."""
    mlp: int
    """Hidden features of each block's MLP."""

    def __post_init__(self) -> None:
        for key in ("blocks", "width", "heads", "mlp"):
            if getattr(self, key) < 1:
                raise ValueError(f"tower {key}={getattr(self, key)} must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"tower width={self.width} is not a multiple of heads={self.heads}")


# One tower is an encoder or a decoder. small, base and large are ViT-VQGAN's sizes (arXiv 2110.04627, second-hand).
TOWERS = {
    "tiny":  TowerConfig(blocks=3,  width=96,   heads=3,  mlp=384),
    "mini":  TowerConfig(blocks=4,  width=192,  heads=6,  mlp=768),
    "small": TowerConfig(blocks=8,  width=512,  heads=8,  mlp=2048),
    "base":  TowerConfig(blocks=12, width=768,  heads=12, mlp=3072),
    "large": TowerConfig(blocks=32, width=1280, heads=16, mlp=5120),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CnnConfig:
    channels: int = 128
    """Channels at full resolution, best a multiple of 16; norms have up to 32 groups of at least 4 channels."""
    multipliers: tuple[int, ...] = (1, 1, 2, 4)
    """Channels at each resolution, as multiples; every further one halves the resolution."""
    res_blocks: int = 2
    """Residual blocks at each resolution."""
    attention: tuple[int, ...] = ()
    """Sides of the feature maps on which each residual block is followed by attention; the middle always has one."""

    def __post_init__(self) -> None:
        if not self.multipliers or min(self.channels, self.res_blocks, *self.multipliers) < 1:
            told = f"channels={self.channels}, multipliers={list(self.multipliers)}, res_blocks={self.res_blocks}"
            raise ValueError(f"model.cnn: {told} must all be at least 1")

    @property
    def patch_size(self) -> int:
        """Pixels per token along each side."""
        return 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True, kw_only=True)
class TokenizerModelConfig:
    architecture: Literal["vit", "cnn", "pixels"] = "vit"
    """Towers: ViT-VQGAN's transformers, or VQGAN's convolutions, which model.cnn describes. `pixels` has none: latents
    are the pixels themselves, for diffusion on small images; there is nothing to set, to train, or to code."""
    preset: str = "small-small"
    """Encoder and decoder size of the ViT, `<encoder>-<decoder>`, each of tiny, mini, small, base, large."""
    patch_size: int = 8
    """Pixels per token along each side; divides data.size."""
    vocab_size: int = 8192
    """Codes in the codebook; without meaning for quantizer.kind=kl."""
    code_dim: int = 32
    """Numbers per code vector; 32 in ViT-VQGAN, 8 keeps more codes in use when training is short."""
    output: Literal["rgb", "logit_laplace"] = "rgb"
    """What the decoder emits: pixels, or mean and scale of a logit-Laplace distribution of each pixel, as published."""
    encoder: TowerConfig | None = None
    """Replaces the ViT encoder of the preset."""
    decoder: TowerConfig | None = None
    """Replaces the ViT decoder of the preset."""
    cnn: CnnConfig = field(default_factory=CnnConfig)
    """The CNN towers; unused by the ViT."""

    def __post_init__(self) -> None:
        names = self.preset.split("-")
        if len(names) != 2 or not set(names) <= TOWERS.keys():
            known = ", ".join(TOWERS)
            raise ValueError(f"model.preset={self.preset!r} must be <encoder>-<decoder>, each one of {known}")
        for key, least in (("patch_size", 1), ("vocab_size", 2), ("code_dim", 2)):
            if getattr(self, key) < least:
                raise ValueError(f"model.{key}={getattr(self, key)} must be at least {least}")
        if self.architecture == "cnn" and self.cnn.patch_size != self.patch_size:
            raise ValueError(
                f"model.patch_size={self.patch_size}, but model.cnn.multipliers={list(self.cnn.multipliers)} halve the "
                f"image to {self.cnn.patch_size} pixels per token: set one to fit the other"
            )

    @property
    def learned(self) -> bool:
        """Whether there are networks to train."""
        return self.architecture != "pixels"

    @property
    def towers(self) -> tuple[TowerConfig, TowerConfig]:
        """Encoder and decoder sizes after the overrides."""
        encoder, decoder = self.preset.split("-")
        return self.encoder or TOWERS[encoder], self.decoder or TOWERS[decoder]


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    kind: Literal["codebook", "kl", "fsq", "lfq", "bsq", "simvq", "residual"] = "codebook"
    """The bottleneck: ViT-VQGAN's codebook, continuous KL latents, or one of vector-quantize-pytorch (extra:
    quantizers)."""
    normalize: bool = True
    """Codebook: vectors and codes have length 1 and the nearest is chosen by cosine; false: plain Euclidean vectors."""
    gradient: Literal["straight_through", "rotation"] = "straight_through"
    """Codebook, SimVQ, residual: how the decoder's gradient crosses the nearest-code choice."""
    update: Literal["gradient", "ema"] = "gradient"
    """Codebook: codes follow the gradient of the codebook loss, or a moving average of the vectors that chose them."""
    ema_decay: float = 0.99
    """Codebook: decay of that moving average per step."""
    reduction: Literal["mean", "sum"] = "mean"
    """Codebook and commitment losses are a mean or a sum over the code's numbers; the papers leave it open."""
    kmeans_start: bool = True
    """Codebook: start from the k-means centroids of training vectors instead of random directions."""
    revive_after: int = 100
    """Codebook: replace a code by a training vector after so many steps without use; 0 switches revival off."""
    levels: tuple[int, ...] = ()
    """FSQ: values of each of the code_dim numbers; their product is the vocabulary."""
    depth: int = 2
    """Residual: codes per token, each refining those before it."""

    def __post_init__(self) -> None:
        if self.revive_after < 0:
            raise ValueError(f"quantizer.revive_after={self.revive_after} must not be negative; 0 switches revival off")
        if not 0 < self.ema_decay < 1:
            raise ValueError(f"quantizer.ema_decay={self.ema_decay} must lie between 0 and 1")
        if self.depth < 1:
            raise ValueError(f"quantizer.depth={self.depth} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TokenizerLossConfig:
    l2: float = 1.0
    """Weight of the squared pixel error; pixels count from 0 to 1."""
    l1: float = 0.0
    """Weight of the absolute pixel error; pixels count from 0 to 1."""
    logit_laplace: float = 0.0
    """Weight of the negative log-likelihood under the logit-Laplace output; 0.1 as published."""
    perceptual: float = 0.0
    """Weight of the distance between features of a trained network; 0.1 as published, 0 before a linear probe."""
    perceptual_network: str = "lpips:vgg"
    """`lpips:vgg`, `lpips:alex` or `lpips:squeeze`, with `:<trunk file>` if it is not in torch hub's folder, or
    `timm:<model>:<weights file>[:<input size>]`."""
    adversarial: float = 0.0
    """Weight of the adversarial loss; 0.1 as published. The section discriminator describes the opponent."""
    codebook: float = 1.0
    """Weight of the loss that draws codes to the vectors that chose them."""
    commitment: float = 0.25
    """Weight of the loss that draws vectors to their codes."""
    entropy: float = 0.0
    """Weight of the entropy loss: each vector sure of its code, all codes in use."""
    entropy_temperature: float = 0.01
    """Temperature of the code probabilities in the entropy loss."""
    kl: float = 1e-6
    """Weight of the divergence from a standard normal distribution; quantizer.kind=kl alone has it."""

    def __post_init__(self) -> None:
        weights = ("l2", "l1", "logit_laplace", "perceptual", "adversarial", "codebook", "commitment", "entropy", "kl")
        for key in weights:
            if getattr(self, key) < 0:
                raise ValueError(f"loss.{key}={getattr(self, key)} must not be negative")
        if self.entropy_temperature <= 0:
            raise ValueError(f"loss.entropy_temperature={self.entropy_temperature} must be above 0")
        if self.l2 + self.l1 + self.logit_laplace == 0:
            keys = "loss.l2, loss.l1 and loss.logit_laplace"
            raise ValueError(f"{keys} are all 0: nothing would teach the decoder its pixels; give one a weight")


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    kind: Literal["stylegan2", "patchgan"] = "stylegan2"
    """StyleGAN2's residual discriminator, or pix2pix's of overlapping patches."""
    channels: int = 512
    """StyleGAN2: most channels at any resolution. PatchGAN: see patch_channels."""
    channel_base: int = 32768
    """StyleGAN2: channels at resolution r are channel_base / r, up to `channels`."""
    patch_channels: int = 64
    """PatchGAN: channels of its first layer."""
    patch_layers: int = 3
    """PatchGAN: layers that halve the resolution."""
    objective: Literal["non_saturating", "hinge"] = "non_saturating"
    """The game: logistic losses, or hinges for the discriminator."""
    start_step: int = 0
    """Step before which there is no adversarial loss."""
    start_patience: int = 0
    """From start_step on, wait until the pixel loss has not improved by 1 % for so many steps; 0 does not wait."""
    r1: float = 10.0
    """Weight gamma of the gradient penalty on real images."""
    r1_every: int = 16
    """Steps between gradient penalties, which count as many times as much."""
    lecam: float = 0.0
    """Weight of the LeCam regularisation; 0.001 in MaskBit, 0 switches it off."""
    adaptive: bool = False
    """Scale the adversarial loss to the reconstruction's gradient in the decoder's last layer, as VQGAN does."""
    learning_rate: float | None = None
    """Peak learning rate; absent: the tokenizer's."""
    betas: tuple[float, float] = (0.0, 0.99)
    """AdamW's betas; StyleGAN2's."""

    def __post_init__(self) -> None:
        for key in ("channels", "channel_base", "patch_channels", "patch_layers", "r1_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"discriminator.{key}={getattr(self, key)} must be at least 1")
        for key in ("start_step", "start_patience", "r1", "lecam"):
            if getattr(self, key) < 0:
                raise ValueError(f"discriminator.{key}={getattr(self, key)} must not be negative")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"discriminator.learning_rate={self.learning_rate} must be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"discriminator.betas={list(self.betas)} must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    model: TokenizerModelConfig = field(default_factory=TokenizerModelConfig)
    """The networks."""
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    """How code vectors are chosen and kept in use."""
    loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    """Weights of the losses."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The opponent in the adversarial loss; built only if that has a weight."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimisation."""
    encoder_from: str | None = None
    """Run or tokenizer folder whose encoder and codebook are taken over and kept: only the decoder learns, and codes
    stay valid."""
    latent_statistics: Literal["per_channel", "static"] = "per_channel"
    """How latents are normalised: each channel to zero mean and unit variance, or all by one factor without a shift, to
    a mean square of 1, which keeps the channels' proportions; Stable Diffusion has one factor, too."""
    views: int = 1
    """Versions of each training image on disk, of which a generator draws one: the centre crop, then others as
    data.crop draws them, every second one mirrored if data.flip."""
    low_resolution: int | None = None
    """Encode each image once more, shrunk by this factor and enlarged again: the condition of a diffusion model that
    restores images (diffusion.condition.kind=image). It divides data.size."""
    encode_batch_size: int = 64
    """Images per step of encoding and of validation."""

    def __post_init__(self) -> None:
        for key in ("views", "encode_batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"tokenizer.{key}={getattr(self, key)} must be at least 1")
        if self.low_resolution is not None and self.low_resolution < 2:
            told = f"tokenizer.low_resolution={self.low_resolution}"
            raise ValueError(f"{told} must be at least 2; leave it out to encode no smaller images")
        if self.encoder_from is not None and self.latent_statistics != "per_channel":
            told = f"tokenizer.latent_statistics={self.latent_statistics}"
            raise ValueError(f"{told} has no effect with tokenizer.encoder_from, whose latents are kept: leave it out")
        check_idle(self)
        check_bottleneck(self.model, self.quantizer)
        check_switches(self.quantizer, self.loss)
        if self.loss.logit_laplace and self.model.output != "logit_laplace":
            raise ValueError(
                f"loss.logit_laplace={self.loss.logit_laplace} needs model.output=logit_laplace, not "
                f"{self.model.output}"
            )


def check_idle(config: TokenizerConfig) -> None:
    """Raise ValueError for settings of networks and of training that were changed where there are no networks."""
    if config.model.learned:
        return
    plain = {
        "model": to_dict(TokenizerModelConfig(architecture=config.model.architecture)),
        "quantizer": to_dict(QuantizerConfig()),
        "loss": to_dict(TokenizerLossConfig()),
        "discriminator": to_dict(DiscriminatorConfig()),
        "train": to_dict(TrainConfig()),
        "encoder_from": None,
    }
    given = to_dict(config)
    idle = difference(plain, {key: given[key] for key in plain})
    if idle:
        told = ", ".join(f"tokenizer.{key}={value}" for key, (_, value) in idle.items())
        raise ValueError(
            f"{told}: no effect with tokenizer.model.architecture={config.model.architecture}, which has nothing to"
            " train: leave it out; latent_statistics, views, low_resolution and encode_batch_size alone are read"
        )


def check_bottleneck(model: TokenizerModelConfig, quantizer: QuantizerConfig) -> None:
    """Raise ValueError if the vocabulary is not what the code's numbers can spell."""
    kind, dim, vocab_size = quantizer.kind, model.code_dim, model.vocab_size
    if kind == "fsq" and any(level < 3 for level in quantizer.levels):
        raise ValueError(f"quantizer.levels={list(quantizer.levels)}: fsq needs at least 3 levels for each number")
    if kind == "fsq" and (len(quantizer.levels) != dim or math.prod(quantizer.levels) != vocab_size):
        told = f"quantizer.levels={list(quantizer.levels)}, model.code_dim={dim}, model.vocab_size={vocab_size}"
        raise ValueError(f"{told}: fsq needs code_dim levels whose product is vocab_size, such as 8, 5, 5, 5 for 1000")
    if kind in ("lfq", "bsq") and 2**dim != vocab_size:
        told = f"model.code_dim={dim}, model.vocab_size={vocab_size}"
        raise ValueError(f"{told}: {kind} has a bit per number, so vocab_size must be 2^code_dim = {2**dim}")


# Settings that only some bottlenecks read.
READERS = {
    "normalize": ("codebook",),
    "update": ("codebook",),
    "ema_decay": ("codebook",),
    "gradient": ("codebook", "simvq", "residual"),
    "levels": ("fsq",),
    "depth": ("residual",),
}


def check_switches(quantizer: QuantizerConfig, loss: TokenizerLossConfig) -> None:
    """Raise ValueError for a setting that was changed and that this kind of bottleneck would not read."""
    for key, readers in READERS.items():
        value = getattr(quantizer, key)
        if quantizer.kind not in readers and value != getattr(QuantizerConfig(), key):
            told = f"quantizer.{key}={list(value) if isinstance(value, tuple) else value}"
            raise ValueError(f"{told} has no effect with quantizer.kind={quantizer.kind}: leave it out")
    if loss.entropy and quantizer.kind not in ("codebook", "lfq", "bsq"):
        raise ValueError(f"loss.entropy={loss.entropy}: quantizer.kind={quantizer.kind} has no entropy loss; use 0")
