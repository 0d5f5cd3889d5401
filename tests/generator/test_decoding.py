"""Truncation, guidance and drawing against brute force; the decoding loop on a table of logits and on a tiny VIM."""

import dataclasses
import functools
import itertools
import math
import weakref
from typing import Any

import pytest
import torch

from engine.config import to_dict
from engine.products import packed
from generator.autoregressive import VIM, Autoregressive
from generator.config import AutoregressiveModelConfig, AutoregressiveSampleConfig
from generator.decoding import (
    choose,
    decode,
    distribution,
    draw,
    guidance_at,
    guide,
    keep_top_p,
    seeded_uniforms,
    stream,
)

NEARLY_ALL = 1 - 1e-9
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


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_distribution_equals_brute_force(temperature: float) -> None:
    logits = torch.tensor(PROBABILITIES).log().expand(2, -1) + 3
    for top_k, top_p in itertools.product((0, 1, 3, 9), (0.01, 0.5, 0.75, 1.0)):
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
    assert [guidance_at(progress, settings) for progress in (0, 0.5, NEARLY_ALL)] == pytest.approx(list(values))


def test_cosine_guidance_starts_slower_than_linear() -> None:
    linear, cosine = (AutoregressiveSampleConfig(guidance=3, guidance_schedule=kind) for kind in ("linear", "cosine"))
    assert guidance_at(0.25, cosine) < guidance_at(0.25, linear)


def test_a_power_above_one_lets_cosine_guidance_rise_later() -> None:
    settings = AutoregressiveSampleConfig(guidance=5, guidance_schedule="cosine", guidance_power=2.75)
    found = [guidance_at(progress, settings) for progress in (0, 0.5, 0.9, NEARLY_ALL)]
    expected = [1 + 4 * 0.5 * (1 - math.cos(math.pi * progress**2.75)) for progress in (0, 0.5, 0.9, 1)]
    assert found == pytest.approx(expected) and found[0] == 1
    plain = dataclasses.replace(settings, guidance_power=1.0)
    assert guidance_at(0.5, settings) < guidance_at(0.5, plain) == pytest.approx(3)


@pytest.mark.parametrize(("schedule", "inside"), [("constant", (3, 3, 3)), ("linear", (1.5, 2, 2.5))])
def test_guidance_is_on_from_start_to_stop(schedule, inside: tuple[float, ...]) -> None:
    """The start belongs to the interval, the stop does not; the schedule still runs over the whole sequence."""
    settings = AutoregressiveSampleConfig(
        guidance=3, guidance_schedule=schedule, guidance_start=0.25, guidance_stop=0.75
    )
    found = [guidance_at(progress, settings) for progress in (0, 0.24, 0.25, 0.5, 0.74999999, 0.75, NEARLY_ALL)]
    assert found == pytest.approx([1, 1, *inside, 1, 1])


def test_uniforms_of_a_seed_do_not_depend_on_its_neighbours() -> None:
    together, alone = seeded_uniforms([3, 5, 2**62], 7), seeded_uniforms([5], 7)
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])
    assert together.shape == (3, 7)


NULL = torch.tensor([2, 2])  # of a table with two labels


class Table:
    """Logits that depend on the last token alone: row `label` at the start, then row `code`."""

    leading = 0

    def __init__(self, starts: torch.Tensor, nexts: torch.Tensor) -> None:
        self.starts, self.nexts, self.calls, self.rows = starts, nexts, [], []

    def caches(self, batch_size: int) -> list:
        self.batch_size = batch_size
        return []

    def advance(self, codes, condition, position, caches) -> torch.Tensor:
        assert len(codes) <= self.batch_size
        assert codes.shape[1] + (condition is not None) == len(position)
        self.calls.append(position.tolist())
        self.rows.append(len(codes))
        return self.starts[condition] if codes.shape[1] == 0 else self.nexts[codes[:, -1]]


@pytest.fixture
def table() -> Table:
    generator = torch.Generator().manual_seed(0)
    return Table(torch.randn(3, 6, generator=generator), torch.randn(6, 6, generator=generator))


def test_decode_asks_for_each_position_once(table: Table) -> None:
    codes = decode(table, torch.tensor([0, 1]), torch.rand(2, 4), AutoregressiveSampleConfig(), null=NULL)
    assert codes.shape == (2, 4)
    assert table.calls == [[0], [1], [2], [3]]


def test_decode_continues_a_prefix(table: Table) -> None:
    prefix = torch.tensor([[1, 2], [3, 4]])
    settings = AutoregressiveSampleConfig(temperature=0)
    codes = decode(table, torch.tensor([0, 1]), torch.rand(2, 4), settings, null=NULL, prefix=prefix)
    assert torch.equal(codes[:, :2], prefix)
    assert torch.equal(codes[:, 2], table.nexts[prefix[:, 1]].argmax(-1))
    assert table.calls == [[0, 1, 2], [3]]


def test_guidance_doubles_the_batch_and_guides_the_first_code(table: Table) -> None:
    settings = AutoregressiveSampleConfig(temperature=0, guidance=4)
    labels = torch.tensor([0, 1])
    codes = decode(table, labels, torch.rand(2, 1), settings, null=NULL)
    guided = table.starts[2] + 4 * (table.starts[labels] - table.starts[2])
    assert table.batch_size == 4
    assert torch.equal(codes[:, 0], guided.argmax(-1))


@pytest.mark.parametrize("settings", [
    {}, {"guidance": 1.0, "guidance_schedule": "linear"}, {"guidance": 1.0, "guidance_start": 0.5},
])  # fmt: skip
def test_without_guidance_there_is_no_null_row(table: Table, settings: dict) -> None:
    decode(table, torch.tensor([0, 1]), torch.rand(2, 4), AutoregressiveSampleConfig(**settings), null=NULL)
    assert table.batch_size == 2 and table.rows == [2] * 4


def test_a_prefix_beyond_the_guided_part_needs_no_null_row(table: Table) -> None:
    settings = AutoregressiveSampleConfig(guidance=3, guidance_stop=0.25)
    prefix = torch.tensor([[1, 2, 3]])
    decode(table, torch.tensor([0]), torch.rand(1, 8), settings, null=NULL[:1], prefix=prefix)
    assert table.batch_size == 1 and table.rows == [1] * 5


def test_guidance_on_an_interval_costs_nothing_outside_it(table: Table) -> None:
    settings = AutoregressiveSampleConfig(guidance=3, guidance_start=0.25, guidance_stop=0.75)
    decode(table, torch.tensor([0, 1]), torch.rand(2, 8), settings, null=NULL)
    # Before code 2 (of 8) the null rows catch up; after code 5 they are left behind.
    assert list(zip(table.rows, table.calls, strict=True)) == [
        (2, [0]), (2, [1]), (2, [0, 1]), (4, [2]), (4, [3]), (4, [4]), (4, [5]), (2, [6]), (2, [7]),
    ]  # fmt: skip


@pytest.mark.parametrize(("schedule", "power"), [("linear", 1.0), ("cosine", 1.0), ("cosine", 2.75)])
def test_a_schedule_that_begins_at_one_spares_the_first_code(table: Table, schedule, power: float) -> None:
    settings = AutoregressiveSampleConfig(guidance=3, guidance_schedule=schedule, guidance_power=power)
    decode(table, torch.tensor([0, 1]), torch.rand(2, 3), settings, null=NULL)
    assert list(zip(table.rows, table.calls, strict=True)) == [(2, [0]), (2, [0]), (4, [1]), (4, [2])]


def test_decoded_frequencies_follow_the_softmax(table: Table) -> None:
    num = 20_000
    uniforms = torch.rand(num, 1, generator=torch.Generator().manual_seed(1))
    request = torch.zeros(num, dtype=torch.int64), uniforms, AutoregressiveSampleConfig()
    codes = decode(table, *request, null=torch.full((num,), 2))
    frequencies = torch.bincount(codes[:, 0], minlength=6) / num
    expected = table.starts[0].softmax(-1)
    assert (frequencies - expected).abs().max() < 4 * math.sqrt(0.25 / num)


@pytest.mark.parametrize(("key", "value"), [
    ("temperature", -1), ("top_k", -1), ("top_p", 0), ("top_p", 1.1), ("guidance", -0.5), ("batch_size", 0),
])  # fmt: skip
def test_settings_out_of_range_name_their_key(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"autoregressive\.sample\.{key}={value}"):
        AutoregressiveSampleConfig(**{key: value})


MODEL = AutoregressiveModelConfig(preset="tiny", depth=2, width=32, heads=4, dropout=0.0)
VOCAB, LENGTH, CLASSES = 11, 16, 3
GUIDANCE: dict[str, dict[str, Any]] = {
    "constant": {},
    "interval": {"guidance_start": 0.25, "guidance_stop": 0.75},
    "linear": {"guidance_schedule": "linear"},
    "cosine": {"guidance_schedule": "cosine", "guidance_power": 2.75},
    "cosine interval": {"guidance_schedule": "cosine", "guidance_power": 2.75, "guidance_start": 0.5},
}


@pytest.fixture(params=["vim", "modern"])
def network(request: pytest.FixtureRequest) -> VIM:
    """Untrained, with large weights, so that its distributions are far from uniform."""
    torch.manual_seed(0)
    model = dataclasses.replace(MODEL, block=request.param)
    network = VIM(model, vocab_size=VOCAB, length=LENGTH, num_classes=CLASSES, grid=(4, 4)).eval()
    for parameter in network.parameters():
        parameter.data.mul_(8 if parameter.ndim == 2 else 1)
    return network.requires_grad_(False)


def unknown(rows: int) -> torch.Tensor:
    """Null labels of the network."""
    return torch.full((rows,), CLASSES)


def always_both(
    network: VIM, labels: torch.Tensor, uniforms: torch.Tensor, settings: AutoregressiveSampleConfig, given: int = 0
) -> torch.Tensor:
    """Decode without caches, with both logits for every code; `given` zeros stand for a prefix."""
    codes = torch.zeros(uniforms.shape, dtype=torch.int64)
    for step in range(given, LENGTH):
        so_far = codes[:, : step + 1]
        conditional, null = (network(so_far, rows)[:, -1] for rows in (labels, torch.full_like(labels, CLASSES)))
        logits = null + guidance_at(step / LENGTH, settings) * (conditional - null)
        codes[:, step] = choose(logits, uniforms[:, step], settings)
    return codes


@pytest.mark.parametrize("given", [0, 1, 7])
@pytest.mark.parametrize("kind", GUIDANCE)
def test_guided_codes_equal_those_of_a_loop_that_always_computes_both(network: VIM, kind: str, given: int) -> None:
    settings = AutoregressiveSampleConfig(guidance=3.0, top_k=8, **GUIDANCE[kind])
    labels, uniforms = torch.tensor([0, 1, 2, 0]), seeded_uniforms(range(4), LENGTH)
    prefix = torch.zeros(4, given, dtype=torch.int64) if given else None
    codes = decode(network, labels, uniforms, settings, null=unknown(4), prefix=prefix)
    assert torch.equal(codes, always_both(network, labels, uniforms, settings, given))
    unguided = dataclasses.replace(settings, guidance=1.0)
    assert not torch.equal(codes, always_both(network, labels, uniforms, unguided, given))


@pytest.mark.parametrize("given", [0, 5])
def test_a_stream_yields_each_code_as_it_stands(network: VIM, given: int) -> None:
    settings = AutoregressiveSampleConfig(guidance=2.0, guidance_start=0.25)
    request = (network, torch.tensor([0, 1]), seeded_uniforms([1, 2], LENGTH), settings)
    prefix = torch.full((2, given), 4) if given else None
    whole = decode(*request, null=unknown(2), prefix=prefix)
    buffers = set()
    for place, (done, codes) in enumerate(stream(*request, null=unknown(2), prefix=prefix), start=given + 1):
        assert done == place
        assert torch.equal(codes[:, :done], whole[:, :done])
        buffers.add(codes.data_ptr())
    assert done == LENGTH and len(buffers) == 1
    assert torch.equal(codes, whole)


def test_an_abandoned_stream_leaves_nothing_behind(network: VIM) -> None:
    made: list[weakref.ref] = []

    class Watched:
        leading, advance = network.leading, network.advance

        def caches(self, batch_size: int) -> list:
            caches = network.caches(batch_size)
            made.extend(weakref.ref(cache) for cache in caches)
            return caches

    settings = AutoregressiveSampleConfig(guidance=2.0)
    request = (torch.tensor([0, 1]), seeded_uniforms([1, 2], LENGTH), settings)
    before = decode(network, *request, null=unknown(2))
    steps = stream(Watched(), *request, null=unknown(2))
    next(steps)
    done, codes = next(steps)
    assert torch.is_grad_enabled()  # between two codes the caller's mode holds
    kept = codes.clone()
    assert len(made) == 2 and all(cache() is not None for cache in made)
    del steps
    assert done == 2 and torch.equal(codes, kept)
    assert torch.is_grad_enabled() and all(cache() is None for cache in made)
    assert torch.equal(decode(network, *request, null=unknown(2)), before)


def test_two_streams_at_once_do_not_meet(network: VIM) -> None:
    settings = AutoregressiveSampleConfig(guidance=2.0, guidance_stop=0.5)
    requests = [(torch.tensor([label]), seeded_uniforms([label], LENGTH), settings) for label in (0, 1)]
    alone = [decode(network, *request, null=unknown(1)) for request in requests]
    pairs = zip(*(stream(network, *request, null=unknown(1)) for request in requests), strict=True)
    *_, ((_, first), (_, second)) = pairs
    assert torch.equal(first, alone[0]) and torch.equal(second, alone[1])


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=1)  # decoding has its own, for many shapes
def test_compiled_steps_decode_the_same_codes_whatever_the_shapes(
    network: VIM, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The traced step is run as it was traced: to turn it into machine code takes much longer.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr("generator.decoding.STRETCH", 9)  # windows of 9 and 16 codes
    torch._dynamo.reset()
    settings = AutoregressiveSampleConfig(guidance=3.0, **GUIDANCE["interval"])
    for batch_size in (3, 1):
        request = (packed(network, batch_size), torch.arange(batch_size) % CLASSES)
        uniforms = seeded_uniforms(range(batch_size), LENGTH)
        null = unknown(batch_size)
        compiled = decode(*request, uniforms, dataclasses.replace(settings, compile=True), null=null)
        assert torch.equal(compiled, decode(*request, uniforms, settings, null=null))


@pytest.mark.parametrize("kind", ["constant", "cosine interval"])
def test_a_sample_does_not_depend_on_the_size_of_its_batch(network: VIM, kind: str) -> None:
    block = "vim" if network.rotary is None else "modern"
    card = {
        "config": {"model": to_dict(dataclasses.replace(MODEL, block=block))}, "num_classes": CLASSES,
        "class_names": ["a", "b", "c"], "grid": [4, 4], "vocab_size": VOCAB, "tokenizer_fingerprint": "t",
    }  # fmt: skip
    generator, labels, seeds = Autoregressive(network, card), torch.arange(16) % CLASSES, list(range(50, 66))

    def sample(first: int, last: int) -> torch.Tensor:
        return generator.sample(labels[first:last], seeds[first:last], guidance=2.0, **GUIDANCE[kind])

    sixteen = sample(0, 16)
    assert len(sixteen.unique(dim=0)) > 12
    assert torch.equal(torch.cat([sample(first, first + 5) for first in (0, 5, 10)]), sixteen[:15])
    assert torch.equal(torch.cat([sample(k, k + 1) for k in range(16)]), sixteen)
