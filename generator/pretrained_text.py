"""Frozen CLIP and T5 text encoders inside of a generator (extra: text).

Their weights are no part of it: they are neither trained nor averaged nor saved with it, and its networks share one
copy. Each distinct text is encoded once; a trained linear map brings what it gave to the generator's width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from generator.condition_config import TextConfig
from generator.text_files import TextFolder, open_folder, quiet, read_network, read_tokenizer

CHUNK = 8  # texts encoded together, always as many, so that a text's states do not depend on the others
CACHE_BYTES = 1 << 30


class PretrainedText(nn.Module):
    """Ids int64 [B, L] of `encode_texts` -> tokens [B, L, D]; the last is a summary of the text.

    The tokens are the encoder's last states, each mapped to D numbers and normalised; the summary is likewise made of
    CLIP's state at the end of the text, or of the mean of T5's states. Padding comes out as one learned vector.

    Args:
        width: D, that of the network that reads the tokens.

    Raises:
        ValueError: the weights, or the library that reads them, are missing, or are of another kind.
    """

    def __init__(self, config: TextConfig, width: int) -> None:
        super().__init__()
        self.num_tokens = config.length
        self._states = States(config)  # no module, so that its weights stay out of this one's
        self.tokens = nn.Linear(self._states.width, width)
        self.summary = nn.Linear(self._states.width, width)
        self.norm = nn.LayerNorm(width)
        self.padding = nn.Parameter(torch.zeros(width))
        self.initialize()

    def initialize(self) -> None:
        """Xavier-uniform matrices, a small padding vector."""
        for layer in (self.tokens, self.summary):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.padding, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        states = self._states(ids).to(self.padding.dtype)  # [B, L, W]
        tokens = torch.cat([self.tokens(states[:, :-1]), self.summary(states[:, -1:])], dim=1)  # [B, L, D]
        padded = F.pad(ids[:, :-1] == 0, (0, 1))  # [B, L]; the summary is none
        return torch.where(padded[..., None], self.padding.to(tokens.dtype), self.norm(tokens))


class States:
    """What a frozen encoder makes of texts, float32 [B, L, W]; its weights are read when the first text comes.

    A copy is the same object: there is one set of weights and one cache.
    """

    def __init__(self, config: TextConfig) -> None:
        self.files, self.length = files_of(config), config.length
        self.width = self.files.width
        self.room = max(CHUNK, CACHE_BYTES // (4 * self.length * self.width))
        self._known: dict[bytes, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> States:
        return self

    @torch.compiler.disable
    def __call__(self, ids: Tensor) -> Tensor:
        """States [B, L, W] of ids [B, L]: those of the tokens, 0 at padding, the summary in the last place."""
        if ids.is_meta or isinstance(ids, FakeTensor):  # someone counts what the trained part costs
            return torch.empty(*ids.shape, self.width, device=ids.device)
        keys = [row.tobytes() for row in ids.cpu().numpy()]
        rows = dict(zip(keys, ids, strict=True))
        found = {key: self._known[key] for key in rows if key in self._known}
        new = [key for key in rows if key not in found]
        for first in range(0, len(new), CHUNK):
            chunk = new[first : first + CHUNK]
            filled = chunk + chunk[-1:] * (CHUNK - len(chunk))
            states = self._encoded(torch.stack([rows[key] for key in filled]))  # [CHUNK, L, W]
            found |= {key: row.clone() for key, row in zip(chunk, states, strict=False)}
        self._remember({key: found[key] for key in new})
        return torch.stack([found[key].to(ids.device) for key in keys])

    def _remember(self, states: dict[bytes, Tensor]) -> None:
        """Keep these, and of the older ones as many as there is room for, the newest."""
        self._known |= states
        for key in list(self._known)[: max(0, len(self._known) - self.room)]:
            del self._known[key]

    @torch.inference_mode(False)  # a text that a preview meets first is later trained on
    @torch.no_grad()
    def _encoded(self, ids: Tensor) -> Tensor:
        """States [n, L, W] of ids [n, L], whatever the autocast."""
        words = ids[:, : longest(self.files, self.length)]  # [n, T]
        mask = words > 0
        known = torch.where(mask, words - 1, _tokenizer(self.files).pad_token_id or 0)
        with torch.autocast(ids.device.type, enabled=False):
            out = _network(self.files).to(ids.device)(input_ids=known, attention_mask=mask.long())
        hidden = out.last_hidden_state * mask[..., None]  # [n, T, W]
        if self.files.encoder == "clip":
            summary = out.pooler_output  # [n, W]
        else:
            summary = hidden.sum(1) / mask.sum(1, keepdim=True)
        states = hidden.new_zeros(*ids.shape, self.width)
        states[:, : words.shape[1]], states[:, -1] = hidden, summary
        return states


def token_ids(config: TextConfig, texts: Sequence[str], *, whole: bool = False) -> list[list[int]]:
    """Ids of each text by the encoder's own tokenizer, with its marks of beginning and end; cut to fit, or `whole`.

    Raises:
        ValueError: with `whole`, a text does not fit; or the folder, the tokenizer or the library is missing.
    """
    files = files_of(config)
    room = longest(files, config.length)
    cut = {} if whole else {"truncation": True, "max_length": room}
    with quiet():
        rows = _tokenizer(files)([" ".join(text.split()) for text in texts], **cut)["input_ids"]
    for text, row in zip(texts, rows, strict=True):
        if len(row) > room:
            raise ValueError(
                f"{text!r} has {len(row)} tokens, but condition.text.length={config.length} and this"
                f" {config.encoder.upper()} leave room for {room}: shorten it, or train with another length"
            )
    return rows


def files_of(config: TextConfig) -> TextFolder:
    """The folder of a frozen encoder. Raises ValueError as `open_folder`."""
    assert config.path is not None, "the section refuses a frozen encoder without a path"
    return open_folder(config.encoder, config.path)


def longest(files: TextFolder, length: int) -> int:
    """Tokens of a text that fit into rows of `length`, of which the last belongs to the summary."""
    return min(length - 1, files.positions or length)


def text_fingerprint(config: TextConfig) -> str | None:
    """What frozen weights and vocabulary a generator relies on; None for an encoder that is trained along.

    Raises:
        ValueError: as `open_folder`.
    """
    return None if config.encoder == "bytes" else files_of(config).fingerprint


def check_fingerprint(config: TextConfig, recorded: str | None) -> None:
    """Raise ValueError unless the frozen encoder of `path` is the one that a generator was trained with."""
    if recorded is not None and (found := text_fingerprint(config)) != recorded:
        raise ValueError(
            f"condition.text.path={config.path} holds weights or a vocabulary {found}, but this generator was trained"
            f" with {recorded}: bring those back, or train again"
        )


# One for all who ask: generator, guide and averages share them.
_network = functools.lru_cache(maxsize=2)(read_network)
_tokenizer = functools.lru_cache(maxsize=2)(read_tokenizer)
