"""A small transformer over the bytes of a text, trained along with the generator that it tells about images.

Needs no vocabulary, no weights and no network. Words are found before the blocks: by convolutions over neighbouring
bytes, whose features the summary begins with, each at its greatest over all places (Kim, 2014; second-hand). So a word
is known again in a text of other wording, which few training texts would not teach attention alone. Then a few bytes
become one token, so that those who read them have fewer, each of which says more (Clark et al., 2022; second-hand).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generator.condition_config import TextConfig
from generator.pretrained_text import PretrainedText
from generator.transformer import Block

SYMBOLS = 257  # padding, and every byte
REACH = 5, 3  # bytes that each of the two convolutions sees at a time
HEAD_WIDTH = 64


class ByteEncoder(nn.Module):
    """Ids int64 [B, L] of `encode_texts` -> tokens [B, N, D]; the last is a summary of the text.

    Padding comes out as one learned vector, so that whoever reads the tokens needs no mask.

    Args:
        width: channels of the encoder.
        length: L, of which the last place belongs to the summary.
        stride: bytes that become one token; N = ceil((L - 1) / stride) + 1.
        out: D, the width of the network that reads the tokens; absent: `width`.
    """

    def __init__(self, *, width: int, length: int, depth: int, stride: int = 1, out: int | None = None) -> None:
        super().__init__()
        self.num_tokens = -(-(length - 1) // stride) + 1  # N
        self.bytes = nn.Embedding(SYMBOLS, width)
        self.positions = nn.Embedding(self.num_tokens, width)
        self.neighbours = nn.ModuleList(nn.Conv1d(width, width, reach, padding="same") for reach in REACH)
        self.found_norm = nn.LayerNorm(width)
        self.gather = nn.Identity() if stride == 1 else nn.Conv1d(width, width, stride, stride)
        self.stride = stride
        self.blocks = nn.ModuleList(Block(width, heads_of(width)) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.padding = nn.Parameter(torch.zeros(width))
        self.widen = nn.Identity() if out in (None, width) else nn.Linear(width, out or width)
        self.initialize()

    def initialize(self) -> None:
        """Bytes N(0, 0.5), so that features of them are not small at first; positions and padding N(0, 0.02); torch's
        own for the rest, with zero biases."""
        nn.init.normal_(self.bytes.weight, std=0.5)
        nn.init.normal_(self.positions.weight, std=0.02)
        nn.init.normal_(self.padding, std=0.02)
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv1d)) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.bytes(ids).mT  # [B, D, L]
        features = embedded
        for layer in self.neighbours:
            features = F.gelu(layer(features))
        features = features.masked_fill((ids == 0)[:, None], 0)
        found = self.found_norm(features.amax(2))  # [B, D]
        room = (self.num_tokens - 1) * self.stride - (ids.shape[1] - 1)  # so that the last token has all its bytes
        words = self.gather(F.pad((embedded + features)[..., :-1], (0, room))).mT  # [B, N - 1, D]
        x = torch.cat([words, found[:, None].to(words.dtype)], dim=1) + self.positions.weight  # [B, N, D]
        for block in self.blocks:
            x = block(x)
        padded = F.pad(ids[:, : -1 : self.stride] == 0, (0, 1))  # [B, N]; the summary is none
        return self.widen(torch.where(padded[..., None], self.padding, self.norm(x)))  # [B, N, D]


def heads_of(width: int) -> int:
    """Heads of 64, or a single one where they do not divide the width."""
    return width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else 1


def build_text_encoder(config: TextConfig, width: int) -> nn.Module:
    """Ids int64 [B, L] -> tokens [B, N, width], N its `num_tokens`; the last of each text is its summary.

    Raises:
        ValueError: the weights of a frozen encoder, or the library that reads them, are missing.
    """
    if config.encoder == "bytes":
        size = {"width": config.width, "length": config.length, "depth": config.depth, "stride": config.stride}
        return ByteEncoder(**size, out=width)
    return PretrainedText(config, width)
