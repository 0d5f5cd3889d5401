"""Greedy decoding gives the codes that transformers' `generate` gives with the same weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from engine.products import packed
from generator.config import AutoregressiveSampleConfig
from generator.decoding import decode, seeded_uniforms

sys.path.insert(0, str(Path(__file__).parent))
from gpt2 import vim_from_gpt2

transformers = pytest.importorskip("transformers")
if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

VOCAB, LENGTH = 97, 40
GREEDY = AutoregressiveSampleConfig(temperature=0)


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    """Random weights; a head of large ones, so that the likeliest token stands well apart from the next."""
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=LENGTH + 1, n_embd=32, n_layer=2, n_head=4,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.1)
    model.lm_head.weight.data.mul_(20)
    return model


def generated(model: GPT2LMHeadModel, prompt: torch.Tensor) -> torch.Tensor:
    """The LENGTH tokens [B, LENGTH] that begin with those of `prompt` [B, P] after its first."""
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_length=LENGTH + 1, pad_token_id=0
    )
    assert tokens.shape == (len(prompt), LENGTH + 1)
    return tokens[:, 1:]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("packs", [False, True])
def test_greedy_codes_are_those_of_transformers(gpt2: GPT2LMHeadModel, batch_size: int, packs: bool) -> None:
    given = torch.randint(VOCAB, (batch_size, 4), generator=torch.Generator().manual_seed(1))
    prompt = torch.cat([torch.zeros(batch_size, 1, dtype=torch.int64), given], dim=1)
    network = vim_from_gpt2(gpt2, LENGTH)
    network = packed(network, batch_size) if packs else network
    request = (torch.zeros(batch_size, dtype=torch.int64), seeded_uniforms(range(batch_size), LENGTH), GREEDY)

    from_the_start = decode(network, *request, null=request[0])
    assert torch.equal(from_the_start, generated(gpt2, prompt[:, :1]))
    continued = decode(network, *request, null=request[0], prefix=given)
    assert torch.equal(continued, generated(gpt2, prompt))
    assert all(len(row.unique()) > 5 for row in continued)  # no dull loop, in which any decoding would agree
