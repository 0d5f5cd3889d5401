"""The tokenizer: pixels <-> latents <-> codes. Only here do images change their form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoint import load_model
from engine.images import to_float, to_uint8
from tokenizer.cnn import CnnDecoder, CnnEncoder
from tokenizer.config import CnnConfig, QuantizerConfig, TokenizerLossConfig, TokenizerModelConfig, TowerConfig
from tokenizer.losses import logit_laplace_mean
from tokenizer.pixels import Colours, PixelDecoder, PixelEncoder
from tokenizer.quantize import build_bottleneck
from tokenizer.vit import Decoder, Encoder

CHANNELS = {"rgb": 3, "logit_laplace": 6}  # that the decoder emits


class Tokenizer(nn.Module):
    """Encoder, bottleneck, decoder: ViT-VQGAN (arXiv 2110.04627; second-hand), VQGAN's convolutions, or mere pixels.

    Latents are what the bottleneck quantises (unit vectors before the codebook, means before KL noise, colours of
    pixels), less `latent_mean` and over `latent_std`, two buffers per channel that are measured over the training
    images once all else is learnt.

    Attributes:
        image_size: height and width in pixels.
        grid: tokens down and across.
        length: codes per image T, the product of the grid and of the codes per token.
        vocab_size: number of codes K; 0 where the bottleneck has none.
        latent_shape: (C, h, w).
        fingerprint: identifies trained weights and configuration; empty before the model is saved.
        code_fingerprint: identifies what decides codes and latents, which is all but the decoder.
        taps: names of activations for `features`.

    Raises:
        ValueError: the patch size does not divide the image size.
    """

    def __init__(
        self,
        model: TokenizerModelConfig,
        quantizer: QuantizerConfig | None = None,
        *,
        image_size: int,
        loss: TokenizerLossConfig | None = None,
    ) -> None:
        super().__init__()
        side = grid_side(model, image_size)
        self.config, self.bottleneck = model, quantizer or QuantizerConfig()
        self.image_size, self.grid, self.fingerprint, self.code_fingerprint = image_size, (side, side), "", ""
        self.encoder = build_encoder(model, self.bottleneck, image_size)
        self.quantizer = build_bottleneck(model, self.bottleneck, loss) if model.learned else Colours()
        self.decoder = build_decoder(model, image_size)
        self.vocab_size, self.latent_shape = self.quantizer.vocab_size, (self.quantizer.latent_dim, side, side)
        self.length = side**2 * self.quantizer.codes_per_token
        stages, codes = self._stages if model.learned else (), ("post_quant",) if self.vocab_size else ()
        self.taps = (*stages, "pre_quant", *codes)
        self.register_buffer("latent_mean", torch.zeros(self.quantizer.latent_dim))
        self.register_buffer("latent_std", torch.ones(self.quantizer.latent_dim))
        self.latent_mean: Tensor
        self.latent_std: Tensor

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor], dict[str, Tensor]]:
        """One training pass: images float [B, 3, H, W] in [-1, 1] -> output [B, 3 or 6, H, W], codes, losses, stats.

        `to_pixels` makes images of the output.
        """
        quantised, codes, losses, stats = self.quantizer(self.encoder(images))
        return self.decoder(quantised), codes, losses, stats

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 [B, 3, H, W] -> codes int64 [B, T] in raster order; ValueError where there are none."""
        return self.quantizer.nearest(self.vectors(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, T] -> images uint8 [B, 3, H, W]; ValueError where there are none."""
        if self.vocab_size:
            self._check_codes(codes)
        return self._painted(self.quantizer.lookup(codes))

    @torch.no_grad()
    def to_latents(self, images: Tensor) -> Tensor:
        """Images uint8 [B, 3, H, W] -> normalised latents float32 [B, C, h, w], not quantised."""
        return self._latents(self.vectors(images))

    @torch.no_grad()
    def codes_and_latents(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        """What `encode` and `to_latents` give, from one pass of the encoder; None where there are no codes."""
        vectors = self.vectors(images)
        return self.quantizer.nearest(vectors) if self.vocab_size else None, self._latents(vectors)

    @torch.no_grad()
    def from_latents(self, latents: Tensor) -> Tensor:
        """Latents float [B, C, h, w] -> nearest codes, if there are any -> images uint8 [B, 3, H, W]."""
        return self._painted(self.quantizer.snap(self._raw(latents)))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images uint8 [B, 3, H, W] -> alike, through the bottleneck, and their codes int64 [B, T] or None."""
        vectors = self.vectors(images)
        if not self.vocab_size:
            return self._painted(self.quantizer.snap(vectors)), None
        codes = self.quantizer.nearest(vectors)
        return self.decode(codes), codes

    @torch.no_grad()
    def latents_to_codes(self, latents: Tensor) -> Tensor:
        """Latents float [B, C, h, w] -> codes int64 [B, T]."""
        return self.quantizer.nearest(self._raw(latents))

    @torch.no_grad()
    def features(self, images: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        """Activations averaged over tokens, float32 [B, D] under each tap, from one pass as far as the deepest.

        Images are uint8 [B, 3, H, W]. The taps, in the order of the pass: `patch`, the embedded patches or the first
        convolution; `encoder.<n>`, the stream after stage n of the encoder, from 1; `pre_quant`, what the bottleneck
        quantises; `post_quant`, the code vectors, where there are codes.

        Raises:
            ValueError: an unknown tap, or images of another kind or size.
        """
        for tap in taps:
            if tap not in self.taps:
                raise ValueError(f"tap={tap!r} is unknown; this tokenizer has {', '.join(self.taps)}")
        pooled, ends = {}, {"pre_quant", "post_quant"}.intersection(taps)
        for stage, tokens in zip(self._stages, self.encoder.hidden(self._pixels(images)), strict=True):
            if stage in taps:
                pooled[stage] = tokens.float().mean(dim=1)  # [B, width]
            if not ends and len(pooled) == len(set(taps)):
                return pooled
        vectors = self.quantizer.latents(self.encoder.out(tokens))  # [B, T, C]
        if "pre_quant" in ends:
            pooled["pre_quant"] = vectors.mean(dim=1)
        if "post_quant" in ends:
            pooled["post_quant"] = self.quantizer.snap(vectors).mean(dim=1)
        return pooled

    @torch.no_grad()
    def vectors(self, images: Tensor) -> Tensor:
        """Images uint8 [B, 3, H, W] -> what the bottleneck quantises, float32 [B, h w, C], not scaled yet."""
        return self.quantizer.latents(self.encoder(self._pixels(images)))

    @property
    def _stages(self) -> tuple[str, ...]:
        """Names of what the encoder's `hidden` gives."""
        return ("patch", *(f"encoder.{stage}" for stage in range(1, self.encoder.depth + 1)))

    def _latents(self, vectors: Tensor) -> Tensor:
        normalised = (vectors - self.latent_mean) / self.latent_std  # [B, T, C]
        return normalised.transpose(1, 2).reshape(-1, *self.latent_shape)  # [B, C, h, w]

    def _raw(self, latents: Tensor) -> Tensor:
        """The inverse of `_latents`."""
        if latents.shape[1:] != self.latent_shape:
            raise ValueError(f"latents are {tuple(latents.shape)}; this tokenizer reads [B, *{self.latent_shape}]")
        return latents.float().flatten(2).transpose(1, 2) * self.latent_std + self.latent_mean  # [B, h w, C]

    def _painted(self, vectors: Tensor) -> Tensor:
        """Quantised vectors [B, h w, C] -> images uint8 [B, 3, H, W]."""
        return to_uint8(to_pixels(self.decoder(vectors).float()))

    def _pixels(self, images: Tensor) -> Tensor:
        size = (3, self.image_size, self.image_size)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != size:
            found = f"images are {images.dtype} {tuple(images.shape)}"
            raise ValueError(f"{found}; this tokenizer reads uint8 [B, *{size}]: crop them to that size")
        return to_float(images)

    def _check_codes(self, codes: Tensor) -> None:
        if codes.dtype != torch.int64 or codes.ndim != 2 or codes.shape[1] != self.length:
            found = f"codes are {codes.dtype} {tuple(codes.shape)}"
            raise ValueError(f"{found}; this tokenizer reads int64 [B, {self.length}]")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.vocab_size:
            span = f"{int(codes.min())} .. {int(codes.max())}"
            raise ValueError(f"codes span {span}, outside this tokenizer's 0 .. {self.vocab_size - 1}")


def to_pixels(output: Tensor) -> Tensor:
    """The decoder's output [B, 3 or 6, H, W] -> images [B, 3, H, W], nominally in [-1, 1]; pixels are not clamped."""
    return output if output.shape[1] == 3 else logit_laplace_mean(output)


def grid_side(model: TokenizerModelConfig, image_size: int) -> int:
    """Tokens along each side of an image.

    Raises:
        ValueError: the patch size does not divide the image size.
    """
    if not model.learned:
        return image_size
    if image_size % model.patch_size:
        sizes = f"data.size={image_size}, tokenizer.model.patch_size={model.patch_size}"
        raise ValueError(f"{sizes}: the image size must be a multiple of the patch size; change either")
    return image_size // model.patch_size


def build_encoder(
    model: TokenizerModelConfig, quantizer: QuantizerConfig, image_size: int
) -> Encoder | CnnEncoder | PixelEncoder:
    """Pixels to as many numbers per token as the bottleneck reads: KL takes a mean and a variance for each."""
    if not model.learned:
        return PixelEncoder()
    out_dim, side = model.code_dim * (2 if quantizer.kind == "kl" else 1), grid_side(model, image_size)
    if model.architecture == "cnn":
        return CnnEncoder(model.cnn, image_size=image_size, out_dim=out_dim)
    return Encoder(model.towers[0], grid=(side, side), patch_size=model.patch_size, out_dim=out_dim)


def build_decoder(model: TokenizerModelConfig, image_size: int) -> Decoder | CnnDecoder | PixelDecoder:
    """Quantised vectors to `CHANNELS[model.output]` numbers per pixel."""
    channels, side = CHANNELS[model.output], grid_side(model, image_size)
    if not model.learned:
        return PixelDecoder(side)
    if model.architecture == "cnn":
        return CnnDecoder(model.cnn, image_size=image_size, in_dim=model.code_dim, out_channels=channels)
    return Decoder(
        model.towers[1], grid=(side, side), patch_size=model.patch_size, in_dim=model.code_dim, out_channels=channels
    )


def model_card(tokenizer: Tokenizer) -> dict[str, Any]:
    """What `model.json` must hold to rebuild the network, and what its codes depend on."""
    model, learned = tokenizer.config, tokenizer.config.learned
    config = {
        "model": asdict(model) if learned else {"architecture": model.architecture},
        "quantizer": asdict(tokenizer.bottleneck) if learned else {},
        "image_size": tokenizer.image_size,
    }
    return {"kind": "tokenizer", "config": config, "code_fingerprint": code_fingerprint(tokenizer)}


def code_fingerprint(tokenizer: Tokenizer) -> str:
    """16 hex digits of all that decides codes and latents: encoder, bottleneck, scale and shift; not the decoder."""
    marking = hashlib.sha256(json.dumps(code_settings(tokenizer)).encode())
    for name, value in sorted(tokenizer.state_dict().items()):
        if not name.startswith("decoder."):
            marking.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return marking.hexdigest()[:16]


def code_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """The settings, JSON-ready, that decide codes and latents beside the weights."""
    model, quantizer = tokenizer.config, tokenizer.bottleneck
    if not model.learned:
        return {"architecture": model.architecture, "image_size": tokenizer.image_size}
    tower = asdict(model.cnn if model.architecture == "cnn" else model.towers[0])
    shape = {"image_size": tokenizer.image_size, "patch_size": model.patch_size, "code_dim": model.code_dim}
    codes = {key: getattr(quantizer, key) for key in ("kind", "normalize", "levels", "depth")}
    told = {"architecture": model.architecture, "encoder": tower, "vocab_size": model.vocab_size, **shape, **codes}
    return json.loads(json.dumps(told))


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
    config = card["config"]
    if "quantizer" not in config:
        raise ValueError(f"{folder} holds a tokenizer of an older version of this program: train it again")
    with torch.device("meta"):
        tokenizer = Tokenizer(
            model_config(config["model"]), quantizer_config(config["quantizer"]), image_size=config["image_size"]
        )
    tokenizer.load_state_dict(weights, assign=True)
    tokenizer.fingerprint, tokenizer.code_fingerprint = card["fingerprint"], card["code_fingerprint"]
    return tokenizer.eval().requires_grad_(False)


def model_config(settings: dict[str, Any]) -> TokenizerModelConfig:
    """A model's configuration as its card holds it; nothing but the architecture where nothing is learnt."""
    if settings.keys() == {"architecture"}:
        return TokenizerModelConfig(**settings)
    towers = {key: settings[key] and TowerConfig(**settings[key]) for key in ("encoder", "decoder")}
    tuples = {key: tuple(settings["cnn"][key]) for key in ("multipliers", "attention")}
    return TokenizerModelConfig(**{**settings, **towers, "cnn": CnnConfig(**{**settings["cnn"], **tuples})})


def quantizer_config(settings: dict[str, Any]) -> QuantizerConfig:
    """A bottleneck's configuration as the model's card holds it."""
    return QuantizerConfig(**{**settings, "levels": tuple(settings.get("levels", ()))})


def count_parameters(module: nn.Module) -> int:
    """Number of trained values."""
    return sum(parameter.numel() for parameter in module.parameters())
