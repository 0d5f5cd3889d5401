"""The `tokenizer` section of an experiment: network sizes, quantiser, losses, training. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.config import TrainConfig


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
class TokenizerModelConfig:
    preset: str = "small-small"
    """Encoder and decoder size, `<encoder>-<decoder>`, each of tiny, mini, small, base, large."""
    patch_size: int = 8
    """Pixels per token along each side; divides data.size."""
    vocab_size: int = 8192
    """Codes in the codebook."""
    code_dim: int = 32
    """Numbers per code vector; 32 in ViT-VQGAN, 8 keeps more codes in use when training is short."""
    encoder: TowerConfig | None = None
    """Replaces the encoder of the preset."""
    decoder: TowerConfig | None = None
    """Replaces the decoder of the preset."""

    def __post_init__(self) -> None:
        names = self.preset.split("-")
        if len(names) != 2 or not set(names) <= TOWERS.keys():
            known = ", ".join(TOWERS)
            raise ValueError(f"model.preset={self.preset!r} must be <encoder>-<decoder>, each one of {known}")
        for key, least in (("patch_size", 1), ("vocab_size", 2), ("code_dim", 2)):
            if getattr(self, key) < least:
                raise ValueError(f"model.{key}={getattr(self, key)} must be at least {least}")

    @property
    def towers(self) -> tuple[TowerConfig, TowerConfig]:
        """Encoder and decoder sizes after the overrides."""
        encoder, decoder = self.preset.split("-")
        return self.encoder or TOWERS[encoder], self.decoder or TOWERS[decoder]


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    gradient: Literal["straight_through", "rotation"] = "straight_through"
    """How the decoder's gradient crosses the nearest-code choice."""
    reduction: Literal["mean", "sum"] = "mean"
    """Codebook and commitment losses are a mean or a sum over the code's dimensions; the papers leave it open."""
    kmeans_start: bool = True
    """Start from the k-means centroids of training vectors instead of random directions."""
    revive_after: int = 100
    """Replace a code by a training vector after so many steps without use; 0 switches revival off."""

    def __post_init__(self) -> None:
        if self.revive_after < 0:
            raise ValueError(f"quantizer.revive_after={self.revive_after} must not be negative; 0 switches revival off")


@dataclass(frozen=True, kw_only=True)
class TokenizerLossConfig:
    l2: float = 1.0
    """Weight of the squared pixel error."""
    l1: float = 0.0
    """Weight of the absolute pixel error."""
    codebook: float = 1.0
    """Weight of the loss that draws codes to the vectors that chose them."""
    commitment: float = 0.25
    """Weight of the loss that draws vectors to their codes."""

    def __post_init__(self) -> None:
        for key in ("l2", "l1", "codebook", "commitment"):
            if getattr(self, key) < 0:
                raise ValueError(f"loss.{key}={getattr(self, key)} must not be negative")
        if self.l2 + self.l1 == 0:
            raise ValueError("loss.l2 and loss.l1 are both 0: nothing would teach the decoder; give one a weight")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    model: TokenizerModelConfig = field(default_factory=TokenizerModelConfig)
    """The networks."""
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    """How code vectors are chosen and kept in use."""
    loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    """Weights of the losses."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimisation."""
    views: int = 1
    """Versions of each training image on disk, of which a generator draws one: the centre crop, then others as
    data.crop draws them, every second one mirrored if data.flip."""
    encode_batch_size: int = 64
    """Images per step of encoding and of validation."""

    def __post_init__(self) -> None:
        for key in ("views", "encode_batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"tokenizer.{key}={getattr(self, key)} must be at least 1")
