"""DiT: a transformer that predicts from noisy latents, their log SNR and a label (Peebles & Xie, 2023).

Conditioning enters through adaLN-zero: every block's norms are shifted and scaled, and its branches gated, by numbers
computed from the condition. Gates and output start at zero, so a new network is the identity and predicts 0.
QK-norm, rotary positions and SwiGLU, which later networks added, can be had one by one. A text takes the place of the
label: its summary enters as the label does, and every block asks its tokens by cross-attention, which starts at zero
too (as in PixArt-alpha, Chen et al., 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.activation import gelu
from generator.learned_schedule import LearnedSchedule
from generator.path import beside, cosine_time
from generator.rotary import Rotary, Turns
from generator.schedule import trainable
from generator.transformer import MLP, Attention, CrossAttention, SwiGLU

NUM_FREQUENCIES = 128
# Waves over log SNR, trained on in [-18.4, 18.4]: from half a wave over the whole range to 1.6 per unit.
LOWEST_FREQUENCY, HIGHEST_FREQUENCY = 0.1, 10.0  # radians per unit of log SNR


class DiT(nn.Module):
    """Latents [B, C, h, w], log SNR [B], labels [B] -> prediction [B, out_channels, h, w].

    Log SNRs may be a map [B, C, h, w] instead, and labels the latents of another image (`image_channels`), or the ids
    [B, L] of a text (`text`). Label `num_classes` is the null label. Published sizes carry a learnt variance:
    out_channels = 2 C.

    Args:
        qk_norm: normalise queries and keys in each head (RMSNorm).
        rope: turn queries and keys by row and column, beside the fixed positions that the tokens carry.
        swiglu: SwiGLU in place of GELU, at about the same number of weights.
        image_channels: those of the condition, if it is latents [B, C', h, w]; the patches then take both.
        text: turns ids [B, L] into tokens [B, N, D], the last of them a summary.
        level_channels: those of a map of log SNRs [B, C'', h, w], which the patches take too; 0 if a row has one level.

    Raises:
        ValueError: sides that patch_size does not divide, a width that is not a multiple of four and of heads, with
            rope a head that is not a multiple of four wide.
    """

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        *,
        depth: int,
        width: int,
        heads: int,
        patch_size: int = 1,
        num_classes: int = 0,
        mlp_ratio: int = 4,
        out_channels: int | None = None,
        qk_norm: bool = False,
        rope: bool = False,
        swiglu: bool = False,
        image_channels: int = 0,
        level_channels: int = 0,
        text: nn.Module | None = None,
    ) -> None:
        super().__init__()
        channels, height, side = latent_shape
        if height % patch_size or side % patch_size:
            raise ValueError(f"diffusion.model.patch_size={patch_size} must divide the latents' {height} x {side}")
        self.latent_shape, self.patch_size, self.num_classes = tuple(latent_shape), patch_size, num_classes
        self.grid = height // patch_size, side // patch_size
        self.image_channels, self.level_channels = image_channels, level_channels
        self.patches = nn.Conv2d(channels + image_channels + level_channels, width, patch_size, patch_size)
        self.learned_schedule: LearnedSchedule | None = None  # for `build_denoiser` to attach
        self.noise_level = NoiseLevel(width)
        self.labels = nn.Embedding(num_classes + 1, width) if text is None and not image_channels else None
        self.rotary = Rotary(width // heads, columns=self.grid[1]) if rope else None
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=mlp_ratio, qk_norm=qk_norm, swiglu=swiglu, text=text is not None)
            for _ in range(depth)
        )
        self.summary = None if text is None else nn.Linear(width, width)
        self.output = Output(width, patch_size**2 * (out_channels or channels))
        self.positions: Tensor
        self.register_buffer("positions", sincos_positions(width, self.grid), persistent=False)  # [T, D]
        self.initialize()
        self.text = text  # after the initialisation, as it has its own

    def initialize(self) -> None:
        """Xavier-uniform matrices, small embeddings, zero gates, zero outputs of cross-attention and of the network."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:  # SwiGLU has none
                    nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.patches.weight.flatten(1))
        assert self.patches.bias is not None
        nn.init.zeros_(self.patches.bias)
        conditions = [layer.weight for layer in (self.labels, self.summary) if layer is not None]
        for small in (*conditions, self.noise_level.rise.weight, self.noise_level.fall.weight):
            nn.init.normal_(small, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(("modulation.weight", "cross.out.weight")) or name == "output.linear.weight":
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, logsnr: Tensor, condition: Tensor) -> Tensor:
        tokens, shared, text = self.embed(x, logsnr, condition)
        for mixed in self.mix(tokens, shared, text):
            tokens = mixed
        return self.unpatchify(self.output(tokens, shared))

    def activations(self, x: Tensor, logsnr: Tensor, condition: Tensor) -> Iterator[Tensor]:
        """Tokens [B, T, D] after each block in turn."""
        return self.mix(*self.embed(x, logsnr, condition))

    def mix(self, tokens: Tensor, shared: Tensor, text: Tensor | None = None) -> Iterator[Tensor]:
        """Tokens [B, T, D] after each block in turn; arguments as `embed` returns them."""
        turns = self.rotary(1 + torch.arange(tokens.shape[1], device=tokens.device)) if self.rotary else None
        for block in self.blocks:
            tokens = block(tokens, shared, turns, text)
            yield tokens

    def embed(self, x: Tensor, logsnr: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens [B, T, D] with their positions, the level and the condition [B, D] after the SiLU that all modulations
        share, and the tokens [B, N, D] of a text."""
        self.check_latents(x)
        seen = self.with_maps(x, logsnr, condition)
        tokens = self.patches(seen).flatten(2).transpose(1, 2) + self.positions  # [B, T, D]
        shared, text = self.noise_level(mean_level(logsnr)), None  # [B, D]
        if self.labels is not None:
            shared = shared + self.labels(condition)
        if self.text is not None:
            assert self.summary is not None
            text = self.read(condition)  # [B, N, D]
            shared = shared + self.summary(text[:, -1])
        return tokens, F.silu(shared), text

    def read(self, condition: Tensor) -> Tensor:
        """The condition as `forward` takes it time and again: of the ids [B, L] of texts, their tokens [B, N, D]."""
        return condition if self.text is None or condition.is_floating_point() else self.text(condition)

    def with_maps(self, x: Tensor, logsnr: Tensor, condition: Tensor) -> Tensor:
        """What the patches take: latents [B, C, h, w], and behind them the condition and the levels that are maps.

        Levels go in as 1 - 2 t of the cosine schedule's time t: in (-1, 1), and telling both ends apart.
        """
        parts = [x]
        if self.image_channels:
            parts.append(condition.to(x.dtype))
        if self.level_channels:
            levels = 1 - 2 * cosine_time(trainable(beside(logsnr, x)))  # [B, 1 or C, 1 or h, 1 or w]
            parts.append(levels.to(x.dtype).expand(-1, self.level_channels, *x.shape[2:]))
        return torch.cat(parts, dim=1) if len(parts) > 1 else x

    def check_latents(self, x: Tensor) -> None:
        """Raise ValueError unless the latents are [B, C, h, w] of this network."""
        if tuple(x.shape[1:]) != self.latent_shape:
            wanted = ", ".join(str(side) for side in self.latent_shape)
            raise ValueError(f"latents of shape {list(x.shape)} do not fit this network, which takes [B, {wanted}]")

    def unpatchify(self, patches: Tensor) -> Tensor:
        """[B, T, out_channels * p * p] -> [B, out_channels, h, w]."""
        squares = patches.transpose(1, 2).unflatten(2, self.grid)  # [B, C p p, h/p, w/p]
        return F.pixel_shuffle(squares, self.patch_size)  # [B, C, h, w]


class Block(nn.Module):
    """Attention and MLP under adaLN-zero: tokens [B, T, D], condition [B, D] -> [B, T, D].

    With `text`, cross-attention to the tokens [B, N, D] of a text stands between the two.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_ratio: int = 4,
        qk_norm: bool = False,
        swiglu: bool = False,
        text: bool = False,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)  # no weights, so it serves both branches
        self.attention = Attention(width, heads, qk_norm=qk_norm)
        self.cross = CrossAttention(width, heads, qk_norm=qk_norm) if text else None
        hidden = mlp_ratio * width
        self.mlp = SwiGLU(width, hidden) if swiglu else MLP(width, hidden, activation=gelu)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(
        self, tokens: Tensor, condition: Tensor, turns: Turns | None = None, text: Tensor | None = None
    ) -> Tensor:
        numbers = self.modulation(condition)[:, None].chunk(6, dim=-1)  # 6 x [B, 1, D]
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = numbers
        mixed = self.attention(modulate(self.norm, tokens, shift_attention, scale_attention), turns=turns)
        tokens = tokens + gate_attention * mixed
        if self.cross is not None:
            assert text is not None, "a network with texts needs their tokens"
            tokens = tokens + self.cross(tokens, text)
        return tokens + gate_mlp * self.mlp(modulate(self.norm, tokens, shift_mlp, scale_mlp))


class Output(nn.Module):
    """Modulated norm and linear map: tokens [B, T, D], condition [B, D] -> [B, T, out]."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, out)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)  # 2 x [B, 1, D]
        return self.linear(modulate(self.norm, tokens, shift, scale))


class NoiseLevel(nn.Module):
    """Log SNR [B] -> embedding [B, D]: sines and cosines of many frequencies, then an MLP.

    Levels that no schedule trains on, -inf and inf among them, count as the nearest one that it does.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rise = nn.Linear(2 * NUM_FREQUENCIES, width)
        self.fall = nn.Linear(width, width)
        frequencies = torch.logspace(math.log10(LOWEST_FREQUENCY), math.log10(HIGHEST_FREQUENCY), NUM_FREQUENCIES)
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, logsnr: Tensor) -> Tensor:
        angles = trainable(logsnr)[:, None] * self.frequencies  # [B, F]
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)  # [B, 2 F]
        return self.fall(F.silu(self.rise(waves)))  # [B, D]


def mean_level(logsnr: Tensor) -> Tensor:
    """Log SNR [B], or the mean [B] of a map [B, ...] in the range of training."""
    return logsnr if logsnr.ndim == 1 else trainable(logsnr).flatten(1).mean(1)


def modulate(norm: nn.Module, tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(tokens) (1 + scale) + shift, in the type of shift and scale [B, 1, D].

    Under autocast that is the branch's bf16; the residual stream, and what is added to it, stay fp32.
    """
    return torch.addcmul(shift, norm(tokens.to(shift.dtype)), 1 + scale)


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed two-dimensional sine-cosine positions in raster order, float32 [h * w, width] (He et al., MAE, 2022).

    The first half of the width encodes the row, the second half the column.

    Raises:
        ValueError: width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"diffusion.model.width={width} must be a multiple of 4 for two-dimensional positions")
    frequencies = 10000 ** (-torch.arange(width // 4) / (width // 4))  # [D / 4]
    rows, columns = (torch.arange(side)[:, None] * frequencies for side in grid)
    row, column = (torch.cat([angle.sin(), angle.cos()], dim=-1) for angle in (rows, columns))  # [h, D/2], [w, D/2]
    height, side = grid
    pairs = row[:, None].expand(-1, side, -1), column[None].expand(height, -1, -1)
    return torch.cat(pairs, dim=-1).flatten(0, 1)  # [T, D]
