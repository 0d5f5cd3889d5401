"""VIM: a causal transformer over image codes (ViT-VQGAN, Yu et al., 2022; second-hand), and the generator around it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.device import check_sampling_precision
from engine.products import packed
from generator.condition import check_guidance, condition_config, condition_of
from generator.condition_config import ConditionConfig
from generator.config import AutoregressiveModelConfig, AutoregressiveSampleConfig, read_settings
from generator.decoding import decode, seeded_uniforms, stream
from generator.order import SOURCE, source_positions
from generator.rotary import Rotary, Turns
from generator.text import build_text_encoder
from generator.transformer import Block, Dropout, KVCache, build_norm


class VIM(nn.Module):
    """A condition and the codes before t predict code t.

    The condition is a label, int64 [B], of which the last is null, for images of no known class; or a text, token ids
    int64 [B, L]. A label is one token; of a text's N tokens the last, its summary, stands where a label would, and the
    others lead it: they predict nothing and lie nowhere. Positions are learned; the modern block turns queries and keys
    besides, by row and column.

    Args:
        grid: rows and columns of cells, which share the `length` codes evenly; needed by the modern block alone.
        random_order: also learn where the newest code lies, to train in orders other than the raster.
        text: turns ids [B, L] into tokens [B, N, D], with N as its `num_tokens`; without one, conditions are labels.

    Raises:
        ValueError: the modern block without a grid.
    """

    def __init__(
        self,
        model: AutoregressiveModelConfig,
        *,
        vocab_size: int,
        length: int,
        num_classes: int,
        grid: Sequence[int] | None = None,
        random_order: bool = False,
        text: nn.Module | None = None,
    ) -> None:
        super().__init__()
        depth, width, heads = model.shape
        modern = model.block == "modern"
        self.vocab_size, self.length, self.num_classes, self.heads = vocab_size, length, num_classes, heads
        self.rotary = _rotary(width // heads, length, grid) if modern else None
        self.code_embedding = nn.Embedding(vocab_size, width)
        self.label_embedding = nn.Embedding(num_classes + 1, width) if text is None else None
        self.position_embedding = nn.Embedding(length, width)
        # Row 0 belongs to the condition, which lies nowhere, and stays 0; row t belongs to the place of code t - 1.
        self.source_embedding = nn.Embedding(length + 1, width, padding_idx=0) if random_order else None
        # Tokens of a text that mean nothing yet are noise, which the encoder would learn to silence, and its words with
        # it: so the summary is mapped like a label, and the leading tokens begin as copies of it. Beginning at zero,
        # they had a gradient that the norm of every block enlarged: a billion times in eight blocks.
        self.gate = None if text is None else nn.Parameter(torch.zeros(width))
        self.summary = None if text is None else nn.Linear(width, width)
        self.dropout = Dropout(model.dropout)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=model.mlp_ratio, dropout=model.dropout, modern=modern) for _ in range(depth)
        )
        self.norm = build_norm(width, modern=modern)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self._initialise()
        self.text = text  # after the initialisation, as it has its own
        self.leading = 0 if text is None else int(text.num_tokens) - 1  # type: ignore[arg-type]
        """Tokens of a condition before its last: N - 1 of a text, none of a label."""

    def forward(self, codes: Tensor, condition: Tensor, order: Tensor | None = None) -> Tensor:
        """Logits [B, T, K] of every code, teacher-forced: codes int64 [B, T], condition int64 [B] or [B, L].

        With an order, a permutation int64 [B, T] of 0 .. T - 1 for each sample, the logits come in that order: row t
        predicts code order[:, t] from the condition and codes order[:, :t]. Without one, the order is the raster.
        """
        for x in self.hidden(codes, condition, order):
            last = x
        return self.head(self.norm(last))

    def hidden(self, codes: Tensor, condition: Tensor, order: Tensor | None = None) -> Iterator[Tensor]:
        """The residual stream [B, T, D] after each block in turn; row t has seen the condition and t codes of the
        order."""
        target = source = torch.arange(codes.shape[1], device=codes.device)  # [T]
        if order is not None:
            codes, target, source = codes.gather(1, order), order, source_positions(order)  # [B, T] each
        x, turns = self._begin(codes[:, :-1], condition, target, source)  # [B, leading + T, D]
        for block in self.blocks:
            x = block(x, causal=True, turns=turns)
            yield x[:, self.leading :]

    def caches(self, batch_size: int) -> list[KVCache]:
        """Empty caches, one for each block, for sequences of full length behind a condition."""
        weight = self.head.weight
        size = (batch_size, self.heads, self.leading + self.length, weight.shape[1] // self.heads)
        return [KVCache(*size, device=weight.device, dtype=weight.dtype) for _ in self.blocks]

    def advance(self, codes: Tensor, condition: Tensor | None, position: Tensor, caches: list[KVCache]) -> Tensor:
        """Logits [B, K] of the next code, after new tokens at `position` [n]: 0 is a condition, if given, then codes.

        A condition's leading tokens, which `position` leaves out, come first in the caches.
        """
        x, turns = self._begin(codes, condition, position, position)  # [B, n, D], or [B, leading + n, D]
        slots = position + self.leading if condition is None else torch.arange(x.shape[1], device=position.device)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache=cache, position=slots, turns=turns)
        return self.head(self.norm(x[:, -1]))

    def _begin(
        self, codes: Tensor, condition: Tensor | None, target: Tensor, source: Tensor
    ) -> tuple[Tensor, Turns | None]:
        """Inputs that predict the codes at `target`, [B, n, D] behind the leading tokens of a condition, and turns.

        What the inputs carry, the condition or a code, is at `source`.
        """
        x = self.code_embedding(codes)
        place = self.position_embedding(target)  # [n, D] or [B, n, D]
        if self.source_embedding is not None:
            place = place + self.source_embedding(source)
        if condition is not None:
            x = torch.cat([self._told(condition), x], dim=1)
            if self.leading:
                place, source = F.pad(place, (0, 0, self.leading, 0)), F.pad(source, (self.leading, 0))
        return self.dropout(x + place), None if self.rotary is None else self.rotary(source)

    def _told(self, condition: Tensor) -> Tensor:
        """The tokens of a condition, [B, 1, D] of labels or [B, N, D] of texts."""
        if self.label_embedding is not None:
            return self.label_embedding(condition)[:, None]
        assert self.text is not None and self.summary is not None and self.gate is not None
        tokens = self.text(condition)  # [B, N, D]
        label = self.summary(tokens[:, -1:])  # [B, 1, D]
        return torch.cat([label + tokens[:, :-1] * self.gate, label], dim=1)

    def _initialise(self) -> None:
        """As GPT-2: N(0, 0.02), and 1/sqrt(2 depth) of it for the layers that write to the residual stream."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.source_embedding is not None:
            self.source_embedding.weight.data[0].zero_()
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.fall.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.blocks)))


class Autoregressive(nn.Module):
    """A trained VIM with all that sampling needs; `card` is what `train_generator` wrote beside the weights."""

    family = "autoregressive"

    def __init__(self, network: VIM, card: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.card = network, card
        self.condition = condition_of(card)
        self.num_classes: int = card["num_classes"]
        self.class_names = tuple(card["class_names"])
        self.label_dropout: float = card["config"]["model"]["label_dropout"]
        self.tokenizer_fingerprint: str = card["tokenizer_fingerprint"]
        self.fingerprint: str = card.get("fingerprint", "")
        self.taps = tuple(f"block{number}" for number in range(1, len(network.blocks) + 1))

    @classmethod
    def from_card(cls, card: dict[str, Any], weights: dict[str, Tensor]) -> Autoregressive:
        """Rebuild a saved generator, in eval mode."""
        with torch.device("meta"):
            network = _network_of(card, random_order=SOURCE in weights)
        network.load_state_dict(weights, assign=True)
        return cls(network, card).eval().requires_grad_(False)

    def sample(self, condition: Any, seeds: Sequence[int], *, prefix: Tensor | None = None, **settings: Any) -> Tensor:
        """Codes int64 [B, T], one row for each seed; row k depends on seed k and rows k of condition and prefix alone.

        That is so up to rounding, which seldom decides a code in fp32: with precision=bf16 the number of rows and
        compilation decide many.

        Args:
            condition: as the generator was trained: labels int64 [B] in 0 .. num_classes - 1, where -1 is no class; or
                B texts, or their ids int64 [B, L]. None samples without any.
            prefix: int64 [B, P], the first codes in raster order, to complete an image.
            settings: keys of AutoregressiveSampleConfig.

        Raises:
            ValueError: a condition that does not fit, a code or a setting out of range, an unknown setting, guidance
                where there is nothing to guide by, or precision=bf16 on hardware without it.
        """
        return decode(**self._request(condition, seeds, prefix, settings))

    def stream(
        self, condition: Any, seeds: Sequence[int], *, prefix: Tensor | None = None, **settings: Any
    ) -> Iterator[tuple[int, Tensor]]:
        """As `sample`, but each new code is told: the number of codes that stand, and all codes int64 [B, T] so far.

        The codes are one buffer, into which later codes are written; those beyond the number mean nothing yet.
        """
        return stream(**self._request(condition, seeds, prefix, settings))

    def _request(
        self, condition: Any, seeds: Sequence[int], prefix: Tensor | None, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """The checked arguments of `decode`, on the network's device."""
        chosen = read_settings(AutoregressiveSampleConfig, "autoregressive.sample", settings)
        self.check_guidance(chosen.guidance)
        device = self.network.head.weight.device
        check_sampling_precision(self.family, chosen.precision, device)
        uniforms = seeded_uniforms(seeds, self.network.length).to(device)  # [B, T]
        rows = self.condition.rows(condition, len(uniforms)).to(device)  # [B] or [B, L]
        if prefix is not None:
            prefix = self._checked(prefix).to(device)
            if prefix.shape[1] >= self.network.length or len(prefix) != len(rows):
                size = f"[{len(rows)}, fewer than {self.network.length}]"
                raise ValueError(f"prefix of shape {tuple(prefix.shape)} must be {size} codes")
        return {
            "decoder": self._decoder(chosen.precision, len(rows)), "condition": rows, "uniforms": uniforms,
            "settings": chosen, "null": self.condition.null(len(rows)).to(device), "prefix": prefix,
        }  # fmt: skip

    def _decoder(self, precision: str, rows: int) -> VIM:
        """The network as it decodes fastest: made for each call, since in training weights change."""
        network, dtype = self.network, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        if network.head.weight.dtype != dtype:
            weights = {name: weight.to(dtype) for name, weight in network.state_dict().items()}
            network = self.from_card(self.card, weights).network
        return packed(network, rows)

    def randomised(self, seed: int) -> Autoregressive:
        """A generator of the same shape that has learned nothing, in eval mode; its weights depend on the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            network = _network_of(self.card).to(self.network.head.weight.device)
        return Autoregressive(network, self.card | {"fingerprint": f"random-{seed}"}).eval().requires_grad_(False)

    def check_guidance(self, guidance: float) -> None:
        """Raise ValueError if guidance is asked of a network that did not learn both a condition and none."""
        check_guidance(self.family, guidance, guidable=self.condition.guidable, label_dropout=self.label_dropout)

    @torch.no_grad()
    def features(self, codes: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        """The residual stream averaged over the sequence, float32 [B, D] under each tap, from one pass as far as the
        deepest: `block<n>`, from 1, is the stream after block n.

        The codes [B, T] are teacher-forced without a condition, so that no class leaks (ViT-VQGAN; second-hand).

        Raises:
            ValueError: an unknown tap, or a code out of the vocabulary.
        """
        for tap in taps:
            if tap not in self.taps:
                raise ValueError(f"tap={tap!r} must be one of {', '.join(self.taps)}")
        null = self.condition.null(len(codes)).to(codes.device)
        passed = self.taps[: max((self.taps.index(tap) + 1 for tap in taps), default=0)]
        streams = self.network.hidden(self._checked(codes), null)
        return {tap: x.float().mean(1) for tap, x in zip(passed, streams, strict=False) if tap in taps}

    @torch.no_grad()
    def nll(self, codes: Tensor, condition: Any) -> Tensor:
        """Negative log likelihood of codes [B, T] given a condition as of `sample`, in nats per image [B].

        A generator without classes ignores labels.
        """
        told = condition if self.condition.kind != "class" or self.num_classes else None
        rows = self.condition.rows(told, len(codes)).to(codes.device)
        logits = self.network(self._checked(codes), rows)  # [B, T, K]
        return F.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none").sum(1)

    def _checked(self, codes: Tensor) -> Tensor:
        check_codes(codes, self.network.vocab_size, self.network.length)
        return codes


def build_network(model: AutoregressiveModelConfig, card: dict[str, Any], *, random_order: bool = False) -> VIM:
    """The network for a code grid, vocabulary and condition, as a card names them; without a condition, of labels.

    `random_order` adds the table that training in random orders needs and `generator.order.fold_order` folds away.

    Raises:
        ValueError: the tokenizer has no codes, or the condition is an image.
    """
    if not card["vocab_size"]:
        raise ValueError(
            "the tokenizer (quantizer.kind=kl or model.architecture=pixels) gives latents without codes, which an "
            "autoregressive model cannot learn: leave the section autoregressive out, or choose another tokenizer"
        )
    length = math.prod(card["grid"]) * card.get("codes_per_token", 1)
    size = {key: card[key] for key in ("vocab_size", "num_classes", "grid")}
    text = _text_encoder(condition_config(card), width=model.shape[1])
    return VIM(model, length=length, random_order=random_order, text=text, **size)


def _network_of(card: dict[str, Any], *, random_order: bool = False) -> VIM:
    return build_network(AutoregressiveModelConfig(**card["config"]["model"]), card, random_order=random_order)


def _text_encoder(condition: ConditionConfig, width: int) -> nn.Module | None:
    """What turns texts into tokens of this width, where the condition is one."""
    if condition.kind == "image":
        raise ValueError("autoregressive.condition.kind=image: only diffusion takes images; use class or text")
    return build_text_encoder(condition.text, width) if condition.kind == "text" else None


def _rotary(head_dim: int, length: int, grid: Sequence[int] | None) -> Rotary:
    if grid is None:
        raise ValueError("grid=None: autoregressive.model.block=modern needs the rows and columns of the codes")
    return Rotary(head_dim, columns=grid[1], codes_per_cell=length // math.prod(grid))


def check_codes(codes: Tensor, vocab_size: int, length: int) -> None:
    """Raise ValueError unless the codes [B, T] lie in 0 .. vocab_size - 1 and T is at most `length`."""
    if codes.ndim != 2 or codes.shape[1] > length:
        raise ValueError(f"codes of shape {tuple(codes.shape)} must be [B, T] with T at most {length}")
    low, high = (int(bound) for bound in codes.aminmax()) if codes.numel() else (0, 0)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"code {wrong} is out of the vocabulary 0 .. {vocab_size - 1}: did another tokenizer make it?")
