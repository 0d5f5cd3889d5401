"""VIM: a causal transformer over image codes (ViT-VQGAN, Yu et al., 2022; second-hand), and the generator around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generator.condition import check_guidance, label_rows
from generator.config import AutoregressiveModelConfig, AutoregressiveSampleConfig
from generator.decoding import decode, seeded_uniforms
from generator.transformer import Block, Dropout, KVCache


class VIM(nn.Module):
    """Label and codes before t predict code t; the last label is the null label, for images of no known class."""

    def __init__(self, model: AutoregressiveModelConfig, *, vocab_size: int, length: int, num_classes: int) -> None:
        super().__init__()
        depth, width, heads = model.shape
        self.vocab_size, self.length, self.num_classes, self.heads = vocab_size, length, num_classes, heads
        self.code_embedding = nn.Embedding(vocab_size, width)
        self.label_embedding = nn.Embedding(num_classes + 1, width)
        self.position_embedding = nn.Embedding(length, width)
        self.dropout = Dropout(model.dropout)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=model.mlp_ratio, dropout=model.dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self._initialise()

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Logits [B, T, K] of every code, teacher-forced: codes int64 [B, T], labels int64 [B] in 0 .. num_classes."""
        return self.head(self.norm(self.hidden(codes, labels, len(self.blocks))))

    def hidden(self, codes: Tensor, labels: Tensor, depth: int) -> Tensor:
        """The residual stream [B, T, D] after `depth` blocks; row t has seen the label and codes before t."""
        position = torch.arange(codes.shape[1], device=codes.device)
        x = self._embed(codes[:, :-1], labels, position)                          # [B, T, D]
        for block in self.blocks[:depth]:
            x = block(x, causal=True)
        return x

    def caches(self, batch_size: int) -> list[KVCache]:
        """Empty caches, one for each block, for sequences of full length."""
        weight = self.head.weight
        size = (batch_size, self.heads, self.length, weight.shape[1] // self.heads)
        return [KVCache(*size, device=weight.device, dtype=weight.dtype) for _ in self.blocks]

    def advance(self, codes: Tensor, labels: Tensor | None, position: Tensor, caches: list[KVCache]) -> Tensor:
        """Logits [B, K] of the next code, after new tokens at `position` [n]: a label [B], if given, then codes."""
        x = self._embed(codes, labels, position)                                  # [B, n, D]
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache=cache, position=position)
        return self.head(self.norm(x[:, -1]))

    def _embed(self, codes: Tensor, labels: Tensor | None, position: Tensor) -> Tensor:
        x = self.code_embedding(codes)
        if labels is not None:
            x = torch.cat([self.label_embedding(labels)[:, None], x], dim=1)
        return self.dropout(x + self.position_embedding(position))

    def _initialise(self) -> None:
        """As GPT-2: N(0, 0.02), and 1/sqrt(2 depth) of it for the layers that write to the residual stream."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.fall.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.blocks)))


class Autoregressive(nn.Module):
    """A trained VIM with all that sampling needs; `card` is what `train_generator` wrote beside the weights."""

    family = "autoregressive"

    def __init__(self, network: VIM, card: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.card = network, card
        self.num_classes: int = card["num_classes"]
        self.class_names = tuple(card["class_names"])
        self.label_dropout: float = card["config"]["model"]["label_dropout"]
        self.tokenizer_fingerprint: str = card["tokenizer_fingerprint"]
        self.fingerprint: str = card.get("fingerprint", "")
        self.taps = tuple(f"block_{number}" for number in range(1, len(network.blocks) + 1))

    @classmethod
    def from_card(cls, card: dict[str, Any], weights: dict[str, Tensor]) -> Autoregressive:
        """Rebuild a saved generator, in eval mode."""
        with torch.device("meta"):
            network = build_network(AutoregressiveModelConfig(**card["config"]["model"]), card)
        network.load_state_dict(weights, assign=True)
        return cls(network, card).eval().requires_grad_(False)

    def sample(
        self, labels: Tensor | None, seeds: Sequence[int], *, prefix: Tensor | None = None, **settings: Any
    ) -> Tensor:
        """Codes int64 [B, T], one row for each seed; row k depends on seed k, label k and prefix k alone.

        Args:
            labels: int64 [B] in 0 .. num_classes - 1; -1 or None samples without a class.
            prefix: int64 [B, P], the first codes in raster order, to complete an image.
            settings: keys of AutoregressiveSampleConfig.

        Raises:
            ValueError: a label, a code or a setting out of range, or guidance where there is nothing to guide by.
        """
        chosen = AutoregressiveSampleConfig(**settings)
        self.check_guidance(chosen.guidance)
        device = self.network.head.weight.device
        uniforms = seeded_uniforms(seeds, self.network.length).to(device)         # [B, T]
        labels = label_rows(labels, len(uniforms), self.num_classes).to(device)   # [B]
        if prefix is not None:
            prefix = self._checked(prefix).to(device)
            if prefix.shape[1] >= self.network.length or len(prefix) != len(labels):
                size = f"[{len(labels)}, fewer than {self.network.length}]"
                raise ValueError(f"prefix of shape {tuple(prefix.shape)} must be {size} codes")
        return decode(self.network, labels, uniforms, chosen, null_label=self.num_classes, prefix=prefix)

    def check_guidance(self, guidance: float) -> None:
        """Raise ValueError if guidance is asked of a network that did not learn both a class and no class."""
        check_guidance(self.family, guidance, num_classes=self.num_classes, label_dropout=self.label_dropout)

    @torch.no_grad()
    def features(self, codes: Tensor, tap: str) -> Tensor:
        """The residual stream after block n (`tap` = "block_<n>", from 1), averaged over the sequence: [B, D].

        The codes [B, T] are teacher-forced behind the null label, so that no class leaks (ViT-VQGAN; second-hand).
        """
        if tap not in self.taps:
            raise ValueError(f"tap={tap!r} must be one of {', '.join(self.taps)}")
        labels = codes.new_full((len(codes),), self.num_classes)
        return self.network.hidden(self._checked(codes), labels, self.taps.index(tap) + 1).float().mean(1)

    @torch.no_grad()
    def nll(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Negative log likelihood of codes [B, T] given labels [B] (-1: none known), in nats per image [B].

        A generator without classes ignores the labels.
        """
        rows = label_rows(labels if self.num_classes else None, len(codes), self.num_classes).to(codes.device)
        logits = self.network(self._checked(codes), rows)                         # [B, T, K]
        return F.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none").sum(1)

    def _checked(self, codes: Tensor) -> Tensor:
        check_codes(codes, self.network.vocab_size, self.network.length)
        return codes


def build_network(model: AutoregressiveModelConfig, card: dict[str, Any]) -> VIM:
    """The network for a code grid, vocabulary and number of classes, as a card names them.

    Raises:
        ValueError: the tokenizer has no codes.
    """
    if not card["vocab_size"]:
        raise ValueError(
            "tokenizer.quantizer.kind=kl gives latents without codes, which an autoregressive model cannot learn: "
            "leave the section autoregressive out, or choose another kind"
        )
    length = math.prod(card["grid"]) * card.get("codes_per_token", 1)
    return VIM(model, vocab_size=card["vocab_size"], length=length, num_classes=card["num_classes"])


def check_codes(codes: Tensor, vocab_size: int, length: int) -> None:
    """Raise ValueError unless the codes [B, T] lie in 0 .. vocab_size - 1 and T is at most `length`."""
    if codes.ndim != 2 or codes.shape[1] > length:
        raise ValueError(f"codes of shape {tuple(codes.shape)} must be [B, T] with T at most {length}")
    low, high = (int(bound) for bound in codes.aminmax()) if codes.numel() else (0, 0)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"code {wrong} is out of the vocabulary 0 .. {vocab_size - 1}: did another tokenizer make it?")
