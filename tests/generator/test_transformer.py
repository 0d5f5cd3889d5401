"""Attention, cache, MLP and block, against torch's own layers."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from generator.transformer import MLP, Attention, Block, Dropout, KVCache, drop

WIDTH, HEADS, LENGTH = 32, 4, 9


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("causal", [False, True])
def test_block_equals_torchs_pre_norm_encoder_layer(x: torch.Tensor, causal: bool) -> None:
    torch.manual_seed(0)
    block = Block(WIDTH, HEADS).eval()
    gelu = functools.partial(F.gelu, approximate="tanh")
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, gelu, batch_first=True, norm_first=True).eval()
    names = {
        "self_attn.in_proj_": "attention.qkv.", "self_attn.out_proj.": "attention.out.", "linear1.": "mlp.rise.",
        "linear2.": "mlp.fall.", "norm1.": "attention_norm.", "norm2.": "mlp_norm.",
    }  # fmt: skip
    ours = block.state_dict()
    ends = ("weight", "bias")
    layer.load_state_dict({theirs + end: ours[name + end] for theirs, name in names.items() for end in ends})
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH) if causal else None
    torch.testing.assert_close(block(x, causal=causal), layer(x, src_mask=mask))


def test_attention_is_causal_only_when_asked(x: torch.Tensor) -> None:
    attention = Attention(WIDTH, HEADS)
    changed = x.clone()
    changed[:, 5:] += 1
    torch.testing.assert_close(attention(x, causal=True)[:, :5], attention(changed, causal=True)[:, :5])
    assert not torch.allclose(attention(x)[:, :5], attention(changed)[:, :5], atol=1e-3)


@pytest.mark.parametrize("first", [1, 4])
def test_cached_attention_equals_full_causal_attention(x: torch.Tensor, first: int) -> None:
    block = Block(WIDTH, HEADS).eval()
    cache = KVCache(len(x), HEADS, LENGTH + 3, WIDTH // HEADS)
    pieces = [block(x[:, :first], cache=cache, position=torch.arange(first))]
    for step in range(first, LENGTH):
        pieces.append(block(x[:, step : step + 1], cache=cache, position=torch.tensor([step])))
    torch.testing.assert_close(torch.cat(pieces, dim=1), block(x, causal=True))


def test_a_used_cache_never_shows_later_positions(x: torch.Tensor) -> None:
    attention = Attention(WIDTH, HEADS)
    stale, fresh = (KVCache(len(x), HEADS, LENGTH, WIDTH // HEADS) for _ in range(2))
    attention(x + 1, cache=stale, position=torch.arange(LENGTH))
    start = torch.arange(2)
    torch.testing.assert_close(
        attention(x[:, :2], cache=stale, position=start), attention(x[:, :2], cache=fresh, position=start)
    )


def test_cache_keeps_its_own_precision(x: torch.Tensor) -> None:
    attention = Attention(WIDTH, HEADS)
    cache = KVCache(len(x), HEADS, LENGTH, WIDTH // HEADS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = attention(x, cache=cache, position=torch.arange(LENGTH))
    assert cache.keys.dtype == torch.float32
    torch.testing.assert_close(mixed.float(), attention(x, causal=True), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("make", [
    lambda: Attention(WIDTH, HEADS, dropout=0.5),
    lambda: MLP(WIDTH, 2 * WIDTH, dropout=0.5),
    lambda: Block(WIDTH, HEADS, dropout=0.5),
])  # fmt: skip
def test_dropout_acts_in_training_alone(x: torch.Tensor, make) -> None:
    layer = make()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="width=32 must be a multiple of heads=5"):
        Attention(32, 5)


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_zeroes_its_share_and_keeps_the_mean(rate: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(999, 1001, dtype=dtype, requires_grad=True)
    y = drop(x, rate)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - rate), dtype=dtype).item()}
    assert (y == 0).double().mean().item() == pytest.approx(rate, abs=2e-3)  # four standard deviations
    rows = (y == 0).double().mean(1)
    assert rows.std().item() == pytest.approx((rate * (1 - rate) / 1001) ** 0.5, rel=0.1)  # elements are independent
    y.sum().backward()
    assert torch.equal(x.grad == 0, y == 0)


def test_dropout_follows_the_seed_and_rests_in_evaluation() -> None:
    layer, x = Dropout(0.3), torch.ones(7, 5)
    first, second = (layer(x) for _ in range(2) if torch.manual_seed(1))
    assert torch.equal(first, second) and not torch.equal(layer(x), first)
    assert layer.eval()(x) is x
