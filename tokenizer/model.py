"""The tokenizer: pixels <-> latents <-> codes. Only here do images change their form."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoint import load_model
from engine.images import to_float, to_uint8
from tokenizer.config import QuantizerConfig, TokenizerModelConfig, TowerConfig
from tokenizer.quantize import Codebook, normalize
from tokenizer.vit import Decoder, Encoder


class Tokenizer(nn.Module):
    """ViT encoder, codebook, ViT decoder (ViT-VQGAN, arXiv 2110.04627).

    Latents are the encoder's unit vectors before quantisation, shifted and scaled per channel to zero mean and unit
    variance over the training images; `measure` sets the two buffers after training.

    Attributes:
        image_size: height and width in pixels.
        grid: tokens down and across; T is their product.
        vocab_size: number of codes K.
        latent_shape: (C, h, w).
        fingerprint: identifies trained weights and configuration; empty before the model is saved.
        taps: names of activations for `features`.

    Raises:
        ValueError: the patch size does not divide the image size.
    """

    def __init__(
        self, model: TokenizerModelConfig, quantizer: QuantizerConfig | None = None, *, image_size: int
    ) -> None:
        super().__init__()
        if image_size % model.patch_size:
            sizes = f"data.size={image_size}, tokenizer.model.patch_size={model.patch_size}"
            raise ValueError(f"{sizes}: the image size must be a multiple of the patch size; change either")
        side = image_size // model.patch_size
        self.config, self.image_size, self.grid = model, image_size, (side, side)
        self.vocab_size, self.latent_shape, self.fingerprint = model.vocab_size, (model.code_dim, side, side), ""
        encoder, decoder = model.towers
        self.taps = (*(f"encoder.{block}" for block in range(encoder.blocks)), "codes")
        self.encoder = Encoder(encoder, grid=self.grid, patch_size=model.patch_size, code_dim=model.code_dim)
        self.quantizer = Codebook(model.vocab_size, model.code_dim, quantizer or QuantizerConfig())
        self.decoder = Decoder(decoder, grid=self.grid, patch_size=model.patch_size, code_dim=model.code_dim)
        self.register_buffer("latent_mean", torch.zeros(model.code_dim))
        self.register_buffer("latent_std", torch.ones(model.code_dim))
        self.latent_mean: Tensor
        self.latent_std: Tensor

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """One training pass: images float [B, 3, H, W] in [-1, 1] -> reconstruction alike, codes, losses, stats."""
        quantised, codes, losses, stats = self.quantizer(self.encoder(images))
        return self.decoder(quantised), codes, losses, stats

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 [B, 3, H, W] -> codes int64 [B, T] in raster order."""
        return self.quantizer.nearest(self.vectors(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, T] -> images uint8 [B, 3, H, W]."""
        self._check_codes(codes)
        return to_uint8(self.decoder(self.quantizer.lookup(codes)).float())

    @torch.no_grad()
    def to_latents(self, images: Tensor) -> Tensor:
        """Images uint8 [B, 3, H, W] -> normalised latents float32 [B, C, h, w], not quantised."""
        return self._latents(self.vectors(images))

    @torch.no_grad()
    def codes_and_latents(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What `encode` and `to_latents` give, from one pass of the encoder."""
        vectors = self.vectors(images)
        return self.quantizer.nearest(vectors), self._latents(vectors)

    @torch.no_grad()
    def from_latents(self, latents: Tensor) -> Tensor:
        """Latents float [B, C, h, w] -> nearest codes -> images uint8 [B, 3, H, W]."""
        return self.decode(self.latents_to_codes(latents))

    @torch.no_grad()
    def latents_to_codes(self, latents: Tensor) -> Tensor:
        """Latents float [B, C, h, w] -> codes int64 [B, T]."""
        if latents.shape[1:] != self.latent_shape:
            raise ValueError(f"latents are {tuple(latents.shape)}; this tokenizer reads [B, *{self.latent_shape}]")
        vectors = latents.float().flatten(2).transpose(1, 2)  # [B, T, C]
        return self.quantizer.nearest(vectors * self.latent_std + self.latent_mean)

    @torch.no_grad()
    def features(self, images: Tensor, tap: str) -> Tensor:
        """Activations averaged over tokens, float32 [B, D]: `encoder.<n>`, the stream after block n, or `codes`."""
        if tap not in self.taps:
            raise ValueError(f"tap={tap!r} is unknown; this tokenizer has {', '.join(self.taps)}")
        if tap == "codes":
            return self.quantizer.lookup(self.encode(images)).mean(dim=1)  # [B, code_dim]
        depth = int(tap.removeprefix("encoder.")) + 1
        return self.encoder.hidden(self._pixels(images), depth).float().mean(dim=1)  # [B, width]

    @torch.no_grad()
    def vectors(self, images: Tensor) -> Tensor:
        """Images uint8 [B, 3, H, W] -> unit encoder vectors float32 [B, T, C], before normalisation to latents."""
        return normalize(self.encoder(self._pixels(images)).float())

    def _latents(self, vectors: Tensor) -> Tensor:
        normalised = (vectors - self.latent_mean) / self.latent_std  # [B, T, C]
        return normalised.transpose(1, 2).reshape(-1, *self.latent_shape)  # [B, C, h, w]

    def _pixels(self, images: Tensor) -> Tensor:
        size = (3, self.image_size, self.image_size)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != size:
            found = f"images are {images.dtype} {tuple(images.shape)}"
            raise ValueError(f"{found}; this tokenizer reads uint8 [B, *{size}]: crop them to that size")
        return to_float(images)

    def _check_codes(self, codes: Tensor) -> None:
        tokens = self.grid[0] * self.grid[1]
        if codes.dtype != torch.int64 or codes.ndim != 2 or codes.shape[1] != tokens:
            raise ValueError(f"codes are {codes.dtype} {tuple(codes.shape)}; this tokenizer reads int64 [B, {tokens}]")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.vocab_size:
            span = f"{int(codes.min())} .. {int(codes.max())}"
            raise ValueError(f"codes span {span}, outside this tokenizer's 0 .. {self.vocab_size - 1}")


def model_card(tokenizer: Tokenizer) -> dict[str, Any]:
    """What `model.json` must hold to rebuild the network."""
    return {"kind": "tokenizer", "config": {"model": asdict(tokenizer.config), "image_size": tokenizer.image_size}}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A trained tokenizer from a run folder or a tokenizer folder: averaged weights, eval mode, float32, on the CPU.

    Raises:
        ValueError: there is no complete tokenizer, or its files were cut or altered.
    """
    folder = Path(path)
    if (folder / "tokenizer").is_dir():
        folder = folder / "tokenizer"
    card, weights = load_model(folder)
    if card.get("kind") != "tokenizer":
        raise ValueError(f"{folder / 'model.json'} describes a {card.get('kind')!r}, not a tokenizer")
    settings = dict(card["config"]["model"])
    for tower in ("encoder", "decoder"):
        settings[tower] = settings[tower] and TowerConfig(**settings[tower])
    with torch.device("meta"):
        tokenizer = Tokenizer(TokenizerModelConfig(**settings), image_size=card["config"]["image_size"])
    tokenizer.load_state_dict(weights, assign=True)
    tokenizer.fingerprint = card["fingerprint"]
    return tokenizer.eval().requires_grad_(False)


def count_parameters(module: nn.Module) -> int:
    """Number of trained values."""
    return sum(parameter.numel() for parameter in module.parameters())
