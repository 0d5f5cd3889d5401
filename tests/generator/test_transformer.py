"""Attention, cache, MLP and block, against torch's own layers."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from generator.rotary import Rotary, Turns
from generator.transformer import MLP, Attention, Block, Dropout, KVCache, RMSNorm, SwiGLU, drop

WIDTH, HEADS, LENGTH = 32, 4, 9
ROTARY = Rotary(WIDTH // HEADS, columns=3)
BLOCKS = pytest.mark.parametrize("modern", [False, True])


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


def turns(modern: bool, position: torch.Tensor) -> Turns | None:
    return ROTARY(position) if modern else None


@BLOCKS
@pytest.mark.parametrize("first", [1, 4])
def test_cached_attention_equals_full_causal_attention(x: torch.Tensor, first: int, modern: bool) -> None:
    block = Block(WIDTH, HEADS, modern=modern).eval()
    cache, every = KVCache(len(x), HEADS, LENGTH + 3, WIDTH // HEADS), torch.arange(LENGTH)
    pieces = []
    for start, stop in ((0, first), *((step, step + 1) for step in range(first, LENGTH))):
        position = every[start:stop]
        pieces.append(block(x[:, start:stop], cache=cache, position=position, turns=turns(modern, position)))
    full = block(x, causal=True, turns=turns(modern, every))
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=1e-5, rtol=0)


@BLOCKS
@pytest.mark.parametrize("spare", [0, 2])
def test_views_of_a_cache_hold_what_the_whole_cache_holds(x: torch.Tensor, modern: bool, spare: int) -> None:
    block = Block(WIDTH, HEADS, modern=modern).eval()
    cache, every = KVCache(2 * len(x), HEADS, LENGTH + 3, WIDTH // HEADS), torch.arange(LENGTH)
    full, rows = block(x, causal=True, turns=turns(modern, every)), slice(len(x), 2 * len(x))
    for start, stop in ((0, 4), *((step, step + 1) for step in range(4, LENGTH))):
        view = cache.view(rows=rows, window=stop + spare, complete=spare == 0 and stop == start + 1)
        position = every[start:stop]
        seen = block(x[:, start:stop], cache=view, position=position, turns=turns(modern, position))
        torch.testing.assert_close(seen, full[:, start:stop], atol=1e-5, rtol=0)
    assert (cache.keys[: len(x)] == 0).all() and (cache.keys[len(x) :, :, LENGTH:] == 0).all()
    assert (cache.keys[len(x) :, :, :LENGTH] != 0).all() and (cache.values[len(x) :, :, :LENGTH] != 0).all()


def test_a_complete_view_needs_no_mask() -> None:
    cache = KVCache(2, HEADS, LENGTH, WIDTH // HEADS)
    complete, masked = (cache.view(rows=slice(0, 1), window=5, complete=value) for value in (True, False))
    assert complete.seen_from(torch.tensor([4])) is None
    assert masked.seen_from(torch.tensor([3])).tolist() == [[True, True, True, True, False]]
    assert complete.keys.shape == (1, HEADS, 5, WIDTH // HEADS) and complete.keys.data_ptr() == cache.keys.data_ptr()


def test_a_used_cache_never_shows_later_positions(x: torch.Tensor) -> None:
    attention = Attention(WIDTH, HEADS)
    stale, fresh = (KVCache(len(x), HEADS, LENGTH, WIDTH // HEADS) for _ in range(2))
    attention(x + 1, cache=stale, position=torch.arange(LENGTH))
    start = torch.arange(2)
    torch.testing.assert_close(
        attention(x[:, :2], cache=stale, position=start), attention(x[:, :2], cache=fresh, position=start)
    )


@BLOCKS
def test_cache_keeps_its_own_precision(x: torch.Tensor, modern: bool) -> None:
    attention, position = Attention(WIDTH, HEADS, bias=not modern, qk_norm=modern), torch.arange(LENGTH)
    cache, turned = KVCache(len(x), HEADS, LENGTH, WIDTH // HEADS), turns(modern, position)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = attention(x, cache=cache, position=position, turns=turned)
    assert cache.keys.dtype == torch.float32
    torch.testing.assert_close(mixed.float(), attention(x, causal=True, turns=turned), rtol=0.05, atol=0.05)


@BLOCKS
@pytest.mark.parametrize("place", ["branches", "activations", "weights"])
def test_dropout_acts_on_three_places_in_training_alone(x: torch.Tensor, modern: bool, place: str) -> None:
    block = Block(WIDTH, HEADS, modern=modern, dropout=0.5)
    assert block.dropout.rate == block.mlp.dropout.rate == block.attention.dropout == 0.5
    block.dropout.rate = 0.5 if place == "branches" else 0.0
    block.mlp.dropout.rate = 0.5 if place == "activations" else 0.0
    block.attention.dropout = 0.5 if place == "weights" else 0.0
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_dropped_branches_leave_the_stream_alone(x: torch.Tensor) -> None:
    block = Block(WIDTH, HEADS, dropout=0.5)
    block.mlp.fall.weight.data.zero_()
    block.mlp.fall.bias.data.zero_()
    kept = (block(x) == x).double().mean().item()
    assert kept == pytest.approx(0.5, abs=0.1)  # six standard deviations


def test_dropped_activations_do_not_reach_the_last_layer(x: torch.Tensor) -> None:
    for mlp in (MLP(WIDTH, 2 * WIDTH, dropout=0.5), SwiGLU(WIDTH, 3 * WIDTH, dropout=0.5)):
        caught = []
        mlp.fall.register_forward_pre_hook(lambda _, inputs, into=caught: into.append(inputs[0]))
        mlp(x)
        assert (caught[0] == 0).double().mean().item() == pytest.approx(0.5, abs=0.1)


def test_swiglu_is_its_formula_and_has_about_the_weights_of_an_mlp(x: torch.Tensor) -> None:
    mlp = SwiGLU(WIDTH, 6 * WIDTH)
    gate, value = (x @ half.T for half in mlp.rise.weight.chunk(2))
    torch.testing.assert_close(mlp(x), (gate * gate.sigmoid() * value) @ mlp.fall.weight.T)
    assert mlp.fall.weight.shape == (WIDTH, 128)
    for width in (768, 1536, 2048):
        with torch.device("meta"):
            sizes = [sum(p.numel() for p in kind(width, 4 * width).parameters()) for kind in (SwiGLU, MLP)]
        assert sizes[0] / sizes[1] == pytest.approx(1, abs=0.02)


def test_rms_norm_divides_by_the_root_mean_square_in_fp32(x: torch.Tensor) -> None:
    norm = RMSNorm(WIDTH)
    norm.weight.data.uniform_(0.5, 2)
    expected = x / x.square().mean(-1, keepdim=True).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    half = norm(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, norm(x.bfloat16().float()).bfloat16())


def test_modern_attention_is_its_formula(x: torch.Tensor) -> None:
    attention, position = Attention(WIDTH, HEADS, bias=False, qk_norm=True), torch.arange(LENGTH)
    angles = torch.atan2(*ROTARY(position)[::-1])  # [1, T, d / 2]
    query, key, value = (
        (x @ weight.T).unflatten(-1, (HEADS, -1)).transpose(1, 2) for weight in attention.qkv.weight.chunk(3)
    )
    query, key = (
        torch.complex(*F.normalize(each, dim=-1).mul((WIDTH // HEADS) ** 0.5).chunk(2, dim=-1))
        * torch.polar(torch.ones(()), angles)
        for each in (query, key)
    )
    scores = (query @ key.mH).real / (WIDTH // HEADS) ** 0.5  # [B, H, T, T]
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x, turns=ROTARY(position)), mixed @ attention.out.weight.T)


def test_the_modern_block_has_no_biases_and_the_published_one_no_new_weights() -> None:
    modern, published = (set(dict(Block(WIDTH, HEADS, modern=kind).named_parameters())) for kind in (True, False))
    assert not any(name.endswith("bias") for name in modern)
    assert {name.rpartition(".")[0] for name in published} == {
        "attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.rise", "mlp.fall",
    }  # fmt: skip


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
