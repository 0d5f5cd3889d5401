"""The encoder over bytes: what its tokens depend on, and whether it learns which word stands in a text."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from generator.captions import encode_texts
from generator.condition_config import TextConfig
from generator.text import ByteEncoder, build_text_encoder, heads_of

CONFIG = TextConfig(length=20)


@pytest.fixture
def encoder() -> nn.Module:
    torch.manual_seed(0)
    return build_text_encoder(CONFIG, 32).eval()


@pytest.mark.parametrize(("stride", "count"), [(1, 20), (2, 11), (4, 6), (19, 2), (30, 2)])
def test_tokens_have_the_networks_width_and_a_few_bytes_each(stride: int, count: int) -> None:
    encoder = build_text_encoder(dataclasses.replace(CONFIG, stride=stride), 32).eval()
    tokens = encoder(encode_texts(CONFIG, ["a cat", "", "x" * 40]))
    assert tokens.shape == (3, count, 32) and tokens.dtype == torch.float32 and encoder.num_tokens == count
    assert tokens.isfinite().all()


def test_padding_is_one_learned_vector_and_nothing_else_is(encoder: nn.Module) -> None:
    assert isinstance(encoder, ByteEncoder)
    tokens = encoder(encode_texts(CONFIG, ["a cat", ""]))
    is_padding = (tokens - encoder.widen(encoder.padding)).abs().amax(-1) < 1e-5  # [2, 6]
    assert is_padding[0].tolist() == [False] * 2 + [True] * 3 + [False]
    assert is_padding[1].tolist() == [True] * 5 + [False]


def test_the_summary_reads_every_byte_and_where_it_stands(encoder: nn.Module) -> None:
    texts = ["x" * 19, *("x" * place + "y" + "x" * (18 - place) for place in range(19))]
    summaries = encoder(encode_texts(CONFIG, texts))[:, -1]
    assert torch.pdist(summaries).min() > 1e-4
    assert encoder(encode_texts(CONFIG, [""]))[0, -1].abs().max() > 0.1  # no text has a summary too


def test_a_texts_tokens_do_not_depend_on_the_other_texts(encoder: nn.Module) -> None:
    ids = encode_texts(CONFIG, ["a cat", "one dog", ""])
    torch.testing.assert_close(encoder(ids)[1:2], encoder(ids[1:2]), rtol=0, atol=1e-5)


def test_every_weight_learns(encoder: nn.Module) -> None:
    tokens = encoder(encode_texts(CONFIG, ["a cat", "one dog"]))
    (tokens * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in encoder.parameters())


def test_the_same_seed_makes_the_same_encoder() -> None:
    def made() -> ByteEncoder:
        torch.manual_seed(3)
        return ByteEncoder(width=16, length=8, depth=1)

    assert all(torch.equal(one, other) for one, other in zip(made().parameters(), made().parameters(), strict=True))


@pytest.mark.parametrize(("width", "heads"), [(32, 1), (128, 2), (384, 6), (1152, 18), (100, 1)])
def test_heads_divide_the_width(width: int, heads: int) -> None:
    assert heads_of(width) == heads and width % heads == 0


def test_it_builds_without_weights_in_memory() -> None:
    with torch.device("meta"):
        encoder = build_text_encoder(CONFIG, 64)
        assert encoder(torch.zeros(2, 20, dtype=torch.int64)).shape == (2, 6, 64)


def test_it_learns_words_and_finds_them_in_a_text_that_it_never_saw() -> None:
    words = ("seven", "three", "eight", "zero")
    seen = ("{}", "a {}", "the {}", "number {}", "a small {}", "{} in white", "one {} here", "draw {}")
    config = TextConfig(length=24)
    torch.manual_seed(0)
    encoder, head = ByteEncoder(width=32, length=24, depth=1), nn.Linear(32, len(words))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    ids = encode_texts(config, [text.replace("{}", word) for text in seen for word in words])
    labels = torch.arange(len(words)).repeat(len(seen))
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(head(encoder(ids)[:, -1]), labels)
        loss.backward()
        optimizer.step()
    new = ("the big {}", "a {} in ink", "my {}")
    held_out = encode_texts(config, [text.replace("{}", word) for text in new for word in words])
    found = head(encoder(held_out)[:, -1]).argmax(1)
    assert (found == torch.arange(len(words)).repeat(len(new))).float().mean() > 0.9
