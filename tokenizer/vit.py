"""ViT towers of ViT-VQGAN: pixels to one vector per patch, and back (arXiv 2110.04627; second-hand).

Pre-norm blocks with full attention, learned positions, no class token. The decoder ends in a two-layer head with a
tanh between and has no final activation.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from timm.models import vision_transformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from engine.attention import attention
from tokenizer.config import TowerConfig


class Encoder(nn.Module):
    """Images in [-1, 1] -> one vector of `out_dim` numbers per patch, in raster order."""

    def __init__(self, tower: TowerConfig, *, grid: tuple[int, int], patch_size: int, out_dim: int) -> None:
        super().__init__()
        self.patch_size, self.depth = patch_size, tower.blocks
        self.embed = nn.Linear(3 * patch_size**2, tower.width)
        self.positions = positions(grid, tower.width)
        self.blocks = blocks(tower)
        self.norm = nn.LayerNorm(tower.width)
        self.project = nn.Linear(tower.width, out_dim)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] -> [B, T, out_dim]."""
        for hidden in self.hidden(images):
            last = hidden
        return self.out(last)

    def hidden(self, images: Tensor) -> Iterator[Tensor]:
        """The residual stream [B, T, width]: the embedded patches, then after each block in turn."""
        hidden = self.embed(patchify(images, self.patch_size)) + self.positions  # [B, T, width]
        yield hidden
        for block in self.blocks:
            hidden = block(hidden)
            yield hidden

    def out(self, hidden: Tensor) -> Tensor:
        """From the last of `hidden` to what `forward` gives, [B, T, width] -> [B, T, out_dim]."""
        return self.project(self.norm(hidden))


class Decoder(nn.Module):
    """One vector of `in_dim` numbers per patch -> `out_channels` numbers per pixel, not clamped."""

    def __init__(
        self, tower: TowerConfig, *, grid: tuple[int, int], patch_size: int, in_dim: int, out_channels: int = 3
    ) -> None:
        super().__init__()
        self.grid, self.patch_size = grid, patch_size
        self.embed = nn.Linear(in_dim, tower.width)
        self.positions = positions(grid, tower.width)
        self.blocks = blocks(tower)
        self.norm = nn.LayerNorm(tower.width)
        last = nn.Linear(4 * tower.width, out_channels * patch_size**2)
        self.head = nn.Sequential(nn.Linear(tower.width, 4 * tower.width), nn.Tanh(), last)
        initialise(self)

    @property
    def last_layer(self) -> Tensor:
        """The weight of the final layer, at which VQGAN's adaptive weight looks."""
        return self.head.get_parameter("2.weight")

    def forward(self, vectors: Tensor) -> Tensor:
        """[B, T, in_dim] -> float [B, out_channels, H, W]."""
        hidden = self.embed(vectors) + self.positions  # [B, T, width]
        for block in self.blocks:
            hidden = block(hidden)
        return unpatchify(self.head(self.norm(hidden)), self.grid, self.patch_size)  # [B, C, H, W]


def positions(grid: tuple[int, int], width: int) -> nn.Parameter:
    """A learned position vector per token, [1, T, width]."""
    return nn.Parameter(torch.randn(1, grid[0] * grid[1], width) * 0.02)


class Attention(vision_transformer.Attention):
    """timm's attention, computed by the engine's."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, T, width] -> alike."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, T, d]
        mixed = attention(query, key, value, mask=attn_mask, causal=is_causal)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # [B, T, width]


def blocks(tower: TowerConfig) -> nn.ModuleList:
    """timm's pre-norm transformer blocks, with GELU in the MLP."""
    ratio = tower.mlp / tower.width
    stack = nn.ModuleList(Block(tower.width, tower.heads, ratio, qkv_bias=True) for _ in range(tower.blocks))
    for block in stack:
        block.attn = Attention(tower.width, tower.heads, qkv_bias=True)
    return stack


def initialise(tower: nn.Module) -> None:
    """ViT's initialisation: linear weights from a normal truncated at 2 of standard deviation 0.02, no biases."""
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into flat patches in raster order: [B, C, H, W] -> [B, T, C p p]."""
    B, C, H, W = images.shape
    p = patch_size
    patches = images.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)  # [B, h, w, C, p, p]
    return patches.reshape(B, (H // p) * (W // p), C * p * p)  # [B, T, C p p]


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Inverse of `patchify`: [B, T, C p p] -> [B, C, H, W]."""
    B, _, values = patches.shape
    h, w = grid
    p = patch_size
    cells = patches.reshape(B, h, w, values // p**2, p, p).permute(0, 3, 1, 4, 2, 5)  # [B, C, h, p, w, p]
    return cells.reshape(B, values // p**2, h * p, w * p)  # [B, C, H, W]
