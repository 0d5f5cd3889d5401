"""Truncation, guidance and drawing against brute force; the decoding loop on a table of logits."""

import itertools
import math

import pytest
import torch

from generator.config import AutoregressiveSampleConfig
from generator.decoding import (
    choose,
    decode,
    distribution,
    draw,
    guidance_at,
    guide,
    keep_top_p,
    seeded_uniforms,
)

PROBABILITIES = [0.05, 0.4, 0.1, 0.3, 0.15]


def brute_force(probabilities: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Temperature, top-k, top-p by sorting and summing plain numbers."""
    weights = [p ** (1 / temperature) for p in probabilities]
    order = sorted(range(len(weights)), key=lambda code: -weights[code])
    kept = order[: top_k or None]
    total = sum(weights[code] for code in kept)
    nucleus, mass = [], 0.0
    for code in kept:
        if mass < top_p:
            nucleus.append(code)
        mass += weights[code] / total
    total = sum(weights[code] for code in nucleus)
    return [weights[code] / total if code in nucleus else 0.0 for code in range(len(weights))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), list(itertools.product([0.5, 1.0, 2.0], [0, 1, 3, 9], [0.01, 0.5, 0.75, 1.0]))
)
def test_distribution_equals_brute_force(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.tensor(PROBABILITIES).log().expand(2, -1) + 3
    found = distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    expected = torch.tensor(brute_force(PROBABILITIES, temperature, top_k, top_p)).expand(2, -1)
    torch.testing.assert_close(found, expected)


def test_distribution_is_computed_in_fp32() -> None:
    logits = torch.randn(2, 50, dtype=torch.bfloat16)
    torch.testing.assert_close(distribution(logits), logits.float().softmax(-1))


def test_top_p_keeps_the_likeliest_code_even_of_a_tiny_p() -> None:
    kept = keep_top_p(torch.tensor([[1.0, 3.0, 2.0]]), 1e-12)
    assert kept.isfinite().tolist() == [[False, True, False]]


def test_draw_inverts_the_cumulative_distribution() -> None:
    probabilities = torch.tensor(PROBABILITIES)
    uniforms = (torch.arange(10_000) + 0.5) / 10_000
    codes = draw(probabilities.expand(len(uniforms), -1), uniforms)
    frequencies = torch.bincount(codes, minlength=5) / len(codes)
    torch.testing.assert_close(frequencies, probabilities, rtol=0, atol=2e-4)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_draw_never_gives_a_code_of_probability_zero(uniform: float) -> None:
    probabilities = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    assert probabilities[0, draw(probabilities, torch.tensor([uniform]))] > 0


def test_temperature_zero_takes_the_likeliest_code() -> None:
    logits = torch.tensor([[0.1, 2.0, 1.0], [3.0, 1.0, 2.0]])
    settings = AutoregressiveSampleConfig(temperature=0)
    assert choose(logits, torch.tensor([0.99, 0.99]), settings).tolist() == [1, 0]


def test_guidance_extrapolates_from_null_to_conditional() -> None:
    conditional, null = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 3.0]])
    both = torch.cat([conditional, null])
    torch.testing.assert_close(guide(both, 2.0), torch.tensor([[1.5, 1.0]]))
    torch.testing.assert_close(guide(both, 1.0), conditional)
    torch.testing.assert_close(guide(both, 0.0), null)


@pytest.mark.parametrize(("schedule", "values"), [
    ("constant", (3.0, 3.0, 3.0)), ("linear", (1.0, 2.0, 3.0)), ("cosine", (1.0, 2.0, 3.0)),
])  # fmt: skip
def test_guidance_schedules_reach_the_scale(schedule, values: tuple[float, ...]) -> None:
    settings = AutoregressiveSampleConfig(guidance=3, guidance_schedule=schedule)
    assert [guidance_at(progress, settings) for progress in (0, 0.5, 1)] == pytest.approx(list(values))


def test_cosine_guidance_starts_slower_than_linear() -> None:
    linear, cosine = (AutoregressiveSampleConfig(guidance=3, guidance_schedule=kind) for kind in ("linear", "cosine"))
    assert guidance_at(0.25, cosine) < guidance_at(0.25, linear)


def test_uniforms_of_a_seed_do_not_depend_on_its_neighbours() -> None:
    together, alone = seeded_uniforms([3, 5, 2**62], 7), seeded_uniforms([5], 7)
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])
    assert together.shape == (3, 7)


class Table:
    """Logits that depend on the last token alone: row `label` at the start, then row `code`."""

    def __init__(self, starts: torch.Tensor, nexts: torch.Tensor) -> None:
        self.starts, self.nexts, self.calls = starts, nexts, []

    def caches(self, batch_size: int) -> list:
        self.batch_size = batch_size
        return []

    def advance(self, codes, labels, position, caches) -> torch.Tensor:
        assert len(codes) == self.batch_size
        self.calls.append(position.tolist())
        return self.starts[labels] if codes.shape[1] == 0 else self.nexts[codes[:, -1]]


@pytest.fixture
def table() -> Table:
    generator = torch.Generator().manual_seed(0)
    return Table(torch.randn(3, 6, generator=generator), torch.randn(6, 6, generator=generator))


def test_decode_asks_for_each_position_once(table: Table) -> None:
    codes = decode(table, torch.tensor([0, 1]), torch.rand(2, 4), AutoregressiveSampleConfig(), null_label=2)
    assert codes.shape == (2, 4)
    assert table.calls == [[0], [1], [2], [3]]


def test_decode_continues_a_prefix(table: Table) -> None:
    prefix = torch.tensor([[1, 2], [3, 4]])
    settings = AutoregressiveSampleConfig(temperature=0)
    codes = decode(table, torch.tensor([0, 1]), torch.rand(2, 4), settings, null_label=2, prefix=prefix)
    assert torch.equal(codes[:, :2], prefix)
    assert torch.equal(codes[:, 2], table.nexts[prefix[:, 1]].argmax(-1))
    assert table.calls == [[0, 1, 2], [3]]


def test_guidance_doubles_the_batch_and_guides_the_first_code(table: Table) -> None:
    settings = AutoregressiveSampleConfig(temperature=0, guidance=4)
    labels = torch.tensor([0, 1])
    codes = decode(table, labels, torch.rand(2, 1), settings, null_label=2)
    guided = table.starts[2] + 4 * (table.starts[labels] - table.starts[2])
    assert table.batch_size == 4
    assert torch.equal(codes[:, 0], guided.argmax(-1))


def test_decoded_frequencies_follow_the_softmax(table: Table) -> None:
    num = 20_000
    uniforms = torch.rand(num, 1, generator=torch.Generator().manual_seed(1))
    codes = decode(table, torch.zeros(num, dtype=torch.int64), uniforms, AutoregressiveSampleConfig(), null_label=2)
    frequencies = torch.bincount(codes[:, 0], minlength=6) / num
    expected = table.starts[0].softmax(-1)
    assert (frequencies - expected).abs().max() < 4 * math.sqrt(0.25 / num)


@pytest.mark.parametrize(("key", "value"), [
    ("temperature", -1), ("top_k", -1), ("top_p", 0), ("top_p", 1.1), ("guidance", -0.5), ("batch_size", 0),
])  # fmt: skip
def test_settings_out_of_range_name_their_key(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"autoregressive\.sample\.{key}={value}"):
        AutoregressiveSampleConfig(**{key: value})
