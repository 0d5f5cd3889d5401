"""Attention written out agrees with the fused kernel, however many heads are taken at a time."""

import pytest
import torch
import torch.nn.functional as F

from engine.attention import attention, written_out

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
