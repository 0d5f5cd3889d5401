"""A tokenizer with nothing to learn: every pixel is a token of three numbers, its colours. For diffusion on pixels."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from tokenizer.bottleneck import Codeless

COLOURS = 3


class PixelEncoder(nn.Module):
    """Images in [-1, 1] -> one vector of colours per pixel, in raster order.

    Attributes:
        depth: number of stages between the two, which is none.
    """

    depth = 0

    def forward(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] -> [B, H W, 3]."""
        return images.flatten(2).transpose(1, 2)

    def hidden(self, images: Tensor) -> Iterator[Tensor]:
        """The same once: there are no stages."""
        yield self(images)

    def out(self, hidden: Tensor) -> Tensor:
        """The same: there is no projection."""
        return hidden


class PixelDecoder(nn.Module):
    """The inverse of `PixelEncoder`, for images of `side` x `side` pixels."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, vectors: Tensor) -> Tensor:
        """[B, H W, 3] -> float [B, 3, H, W]."""
        return vectors.transpose(1, 2).unflatten(2, (self.side, self.side))


class Colours(Codeless):
    """A bottleneck that lets everything through; there are no codes."""

    no_codes = (
        "tokenizer.model.architecture=pixels has latents but no codes: train a diffusion model on them, or choose"
        " another architecture"
    )

    def __init__(self) -> None:
        super().__init__()
        self.input_dim, self.latent_dim = COLOURS, COLOURS

    def forward(self, z: Tensor) -> tuple[Tensor, None, dict[str, Tensor], dict[str, Tensor]]:
        """No losses."""
        return z.float(), None, {}, {"vectors": z.float().detach()}

    def latents(self, z: Tensor) -> Tensor:
        """The colours, float32."""
        return z.float()
