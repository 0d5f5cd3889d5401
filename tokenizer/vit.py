"""ViT towers of ViT-VQGAN: pixels to one vector per patch, and back (arXiv 2110.04627; second-hand).

Pre-norm blocks with full attention, learned positions, no class token. The decoder ends in a two-layer head with a
tanh between and emits raw pixels without a final activation.
"""

from __future__ import annotations

import torch
from timm.models import vision_transformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from engine.attention import attention
from tokenizer.config import TowerConfig


class Encoder(nn.Module):
    """Images in [-1, 1] -> one code-sized vector per patch, in raster order."""

    def __init__(self, tower: TowerConfig, *, grid: tuple[int, int], patch_size: int, code_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.embed = nn.Linear(3 * patch_size**2, tower.width)
        self.positions = positions(grid, tower.width)
        self.blocks = blocks(tower)
        self.norm = nn.LayerNorm(tower.width)
        self.project = nn.Linear(tower.width, code_dim)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] -> [B, T, code_dim]."""
        hidden = self.hidden(images, len(self.blocks))  # [B, T, width]
        return self.project(self.norm(hidden))  # [B, T, code_dim]

    def hidden(self, images: Tensor, depth: int) -> Tensor:
        """The residual stream after the first `depth` blocks, [B, T, width]."""
        hidden = self.embed(patchify(images, self.patch_size)) + self.positions  # [B, T, width]
        for block in self.blocks[:depth]:
            hidden = block(hidden)
        return hidden


class Decoder(nn.Module):
    """One code vector per patch -> images, nominally in [-1, 1] but not clamped."""

    def __init__(self, tower: TowerConfig, *, grid: tuple[int, int], patch_size: int, code_dim: int) -> None:
        super().__init__()
        self.grid, self.patch_size = grid, patch_size
        self.embed = nn.Linear(code_dim, tower.width)
        self.positions = positions(grid, tower.width)
        self.blocks = blocks(tower)
        self.norm = nn.LayerNorm(tower.width)
        self.head = nn.Sequential(
            nn.Linear(tower.width, 4 * tower.width), nn.Tanh(), nn.Linear(4 * tower.width, 3 * patch_size**2)
        )
        initialise(self)

    def forward(self, vectors: Tensor) -> Tensor:
        """[B, T, code_dim] -> float [B, 3, H, W]."""
        hidden = self.embed(vectors) + self.positions  # [B, T, width]
        for block in self.blocks:
            hidden = block(hidden)
        return unpatchify(self.head(self.norm(hidden)), self.grid, self.patch_size)  # [B, 3, H, W]


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
