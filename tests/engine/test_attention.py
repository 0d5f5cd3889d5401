"""Attention written out agrees with the fused kernel, however many heads are taken at a time."""

import pytest
import torch
import torch.nn.functional as F

from engine.attention import attention, of_one_query, written_out

LENGTH = 9


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tile", [1, 200, 2**20])
def test_written_out_equals_the_fused_kernel(causal: bool, masked: bool, tile: int) -> None:
    inputs = torch.randn(3, 2, 4, LENGTH, 8, generator=torch.Generator().manual_seed(0)).unbind()
    fused, written = ([tensor.clone().requires_grad_() for tensor in inputs] for _ in range(2))
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(2) if masked and not causal else None
    expected = F.scaled_dot_product_attention(*fused, mask, 0.0, causal)
    found = written_out(*written, mask=mask, dropout=0.0, causal=causal, tile=tile)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), written),
        torch.autograd.grad(expected.square().sum(), fused),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_fewer_queries_than_keys() -> None:
    query, (key, value) = torch.randn(1, 2, 1, 8), torch.randn(2, 1, 2, LENGTH, 8)
    mask = torch.arange(LENGTH) < torch.tensor([[5]])
    expected = F.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(written_out(query, key, value, mask=mask, dropout=0.0, causal=False), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seen", [1, 5, LENGTH, None])
def test_one_query_equals_the_fused_kernel(dtype: torch.dtype, seen: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, (key, value) = (torch.randn(*size, 8, generator=generator) for size in ((3, 4, 1), (2, 3, 4, LENGTH)))
    mask = None if seen is None else torch.arange(LENGTH)[None] < seen  # [1, L]
    found = of_one_query(query.to(dtype), key.to(dtype), value.to(dtype), mask=mask)
    # In bf16 the inputs are rounded, and the result once more; the sums are in fp32.
    rounded = (tensor.to(dtype).float() for tensor in (query, key, value))
    expected = F.scaled_dot_product_attention(*rounded, mask)
    assert found.dtype == dtype and found.shape == (3, 4, 1, 8)
    tolerance = {"atol": 1e-6, "rtol": 1e-5 if dtype == torch.float32 else 2**-8}
    torch.testing.assert_close(found.float(), expected, **tolerance)


def test_one_query_sees_no_key_behind_the_mask() -> None:
    query, (key, value) = torch.randn(1, 2, 1, 8), torch.randn(2, 1, 2, LENGTH, 8)
    mask = torch.arange(LENGTH)[None] < 5
    before = of_one_query(query, key, value, mask=mask)
    key[:, :, 5:], value[:, :, 5:] = 1e4, 1e4
    assert torch.equal(of_one_query(query, key, value, mask=mask), before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_query_equals_the_fused_kernel(dtype: torch.dtype) -> None:
    query, (key, value) = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 4, LENGTH, 8)
    inputs, mask = [tensor.to(dtype) for tensor in (query, key, value)], torch.arange(LENGTH)[None] < 5
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(attention, fullgraph=True)(*inputs, mask=mask)
        expected = F.scaled_dot_product_attention(*(tensor.float() for tensor in inputs), mask)
    torch.testing.assert_close(found.float(), expected, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 2**-8)


def test_bf16_on_a_cpu_is_written_out_and_float32_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    fused = F.scaled_dot_product_attention

    def watched(query: torch.Tensor, *rest: object) -> torch.Tensor:
        calls.append(query.dtype)
        return fused(query, *rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    exact = torch.randn(3, 1, 2, LENGTH, 8, generator=torch.Generator().manual_seed(0))
    rough = attention(*exact.bfloat16())
    assert not calls and rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), attention(*exact), atol=0.02, rtol=0.02)
    assert calls == [torch.float32]


def test_dropout_drops_weights() -> None:
    query, key = torch.randn(2, 1, 1, 64, 8).bfloat16()
    value = torch.ones(1, 1, 64, 1).bfloat16()
    kept = attention(query, key, value, dropout=0.5)
    assert kept.float().std() > 0.05 and kept.float().mean() == pytest.approx(1, abs=0.1)
