"""Consistency training: N(k), noises and their shares at published values, an exact end, the loss, and sampling."""

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.batches import StepRandom
from engine.checkpoint import load_model
from engine.config import DataConfig, RunConfig, TrainConfig, to_dict
from engine.device import Device, setup
from engine.shards import open_shards
from generator.config import (
    CurriculumConfig,
    DenoiserModelConfig,
    DiffusionConfig,
    DiffusionSampleConfig,
    ScheduleConfig,
)
from generator.consistency import ConsistencyObjective, build_objective, pseudo_huber
from generator.consistency_config import ObjectiveConfig
from generator.consistency_task import ConsistencyTask
from generator.diffusion import Diffusion
from generator.discretisation import (
    COUNTS,
    draw_pairs,
    karras_noises,
    lognormal_pairs,
    lognormal_shares,
    noise_count,
    noises_of,
    polynomial_pairs,
)
from generator.objective import Objective
from generator.path import noised, variance_preserving
from generator.sample import load_generator
from generator.solvers import SampleNoise, solve
from generator.train import build_task, train_generator
from tokenizer.config import TokenizerConfig, TokenizerModelConfig
from tokenizer.encode import encode_images
from tokenizer.model import load_tokenizer
from tokenizer.train import train_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import forked
from training import records

TRAIN = TrainConfig(
    steps=4, batch_size=8, learning_rate=1e-2, decay="constant", ema=0.9, log_every=2, preview_every=4,
    checkpoint_every=2,
)  # fmt: skip
MODEL = DenoiserModelConfig(depth=1, width=32, heads=2)
SAMPLE = DiffusionSampleConfig(solver="consistency", num_steps=2, batch_size=10)
DATA = DataConfig(workers=0)
DOUBLING = ObjectiveConfig(kind="consistency")
SINUSOIDAL = ObjectiveConfig(kind="consistency", discretisation="sinusoidal")
CONSTANT = ObjectiveConfig(kind="consistency", discretisation="constant")
SMALL = ObjectiveConfig(kind="consistency", least=4, most=8)
POLYNOMIAL = ObjectiveConfig(
    kind="consistency", discretisation="sinusoidal", least=5, most=9, predefined=True, noises="polynomial",
    huber="element",
)  # fmt: skip
CONFIG = DiffusionConfig(model=MODEL, objective=SMALL, train=TRAIN, sample=SAMPLE)


def with_changes(**changes: Any) -> DiffusionConfig:
    return dataclasses.replace(CONFIG, **changes)


def make_task(run: RunConfig, **changes: Any) -> ConsistencyTask:
    torch.manual_seed(0)
    train, test = (open_shards(run.folder / "codes" / split) for split in ("train", "test"))
    task = build_task(
        with_changes(**changes), train, {}, test_shards=test, tokenizer=load_tokenizer(run.folder)
    )  # fmt: skip
    assert isinstance(task, ConsistencyTask)
    return task


# How many noises


def test_doubling_has_the_published_stages() -> None:
    """K = 400,000: K' = 50,000 and 11 to 1,281 noises."""
    counts = [noise_count(DOUBLING, step, 400_000) for step in range(0, 400_000, 50_000)]
    assert counts == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert [noise_count(DOUBLING, step, 400_000) for step in (49_999, 99_999, 399_999)] == [11, 21, 1281]


def test_doubling_stops_at_most_and_bears_short_trainings() -> None:
    config = dataclasses.replace(DOUBLING, least=10, most=50)  # log2 5 + 1 = 3.32 stages
    assert [noise_count(config, step, 333) for step in (0, 50, 99, 100, 199, 200, 300, 10**6)] == [
        11, 11, 11, 21, 21, 41, 51, 51
    ]  # fmt: skip
    assert [noise_count(DOUBLING, step, 3) for step in range(3)] == [11, 21, 41]


def test_sinusoidal_rises_and_falls_back_as_published() -> None:
    steps = 100_000
    expected = {0: 20, 20_000: 66, 40_000: 169, 50_000: 225, 63_000: 250, 80_000: 206, 90_000: 139, steps - 1: 30}
    assert {step: noise_count(SINUSOIDAL, step, steps) for step in expected} == expected
    counts = [noise_count(SINUSOIDAL, step, steps) for step in range(0, steps, 100)]
    assert len({*counts}) == 31
    assert counts.index(max(counts)) / len(counts) == pytest.approx(0.61, abs=0.02)


def test_sinusoidal_depends_on_rho() -> None:
    config = dataclasses.replace(SINUSOIDAL, rho=5.0)  # k / K itself
    assert noise_count(config, 50, 100) == math.ceil(20 + 230 * math.sin(1.5))


def test_constant_has_least_throughout() -> None:
    assert {noise_count(CONSTANT, step, 100) for step in range(100)} == {20}
    assert noise_count(dataclasses.replace(CONSTANT, least=7), 50, 100) == 7


def test_no_step_has_more_noises_than_the_largest_grid() -> None:
    for config in (DOUBLING, SINUSOIDAL, CONSTANT, SMALL, POLYNOMIAL):
        counts = {noise_count(config, step, 1000) for step in range(1000)}
        assert max(counts) == config.largest
        assert min(counts) >= config.span[0]


# Which noises


def test_noises_are_equally_spaced_in_their_seventh_root() -> None:
    noises = karras_noises(DOUBLING, 11)
    assert float(noises[0]) == pytest.approx(0.002, rel=1e-12) and float(noises[-1]) == pytest.approx(80, rel=1e-12)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    assert float(noises[3]) == pytest.approx((low + 0.3 * (high - low)) ** 7, rel=1e-12)


@pytest.mark.parametrize("config", [DOUBLING, SINUSOIDAL, SMALL, POLYNOMIAL], ids=str)
def test_predefined_noises_are_all_of_one_grid_with_its_ends(config: ObjectiveConfig) -> None:
    config = dataclasses.replace(config, predefined=True)
    grid = karras_noises(config, config.largest).tolist()
    for count in {noise_count(config, step, 500) for step in range(500)}:
        noises = noises_of(config, count).tolist()
        assert len({*noises}) == count and noises == sorted(noises) and {*noises} <= {*grid}
        assert (noises[0], noises[-1]) == (grid[0], grid[-1])
    middle = noises_of(config, 5)[2]
    assert float(middle) == grid[round((config.largest - 1) / 2)]


def test_other_noises_change_with_their_number() -> None:
    first, second = ({*noises_of(SINUSOIDAL, count).tolist()} for count in (20, 21))
    assert len(first & second) <= 2


# How often


def test_lognormal_shares_are_those_of_a_normal_between_the_noises() -> None:
    noises = karras_noises(CONSTANT, 20)
    shares = lognormal_shares(noises, mean=-1.1, deviation=2.0)
    normal = torch.distributions.Normal(torch.tensor(-1.1, dtype=torch.float64), 2.0)
    masses = normal.cdf(noises.log()).diff()
    torch.testing.assert_close(shares, masses / masses.sum())
    students = noises[1:]
    assert float(shares[students >= 10].sum()) == pytest.approx(0.057, abs=5e-4)
    assert float(shares[students >= 40].sum()) == pytest.approx(0.008, abs=5e-4)


def test_lognormal_pairs_come_as_often_as_their_shares() -> None:
    shares = lognormal_shares(karras_noises(CONSTANT, 11), mean=-1.1, deviation=2.0)
    pairs = lognormal_pairs(shares, (torch.arange(100_000) + 0.5) / 100_000)
    torch.testing.assert_close(pairs.bincount(minlength=10) / 1e5, shares.float(), rtol=0, atol=2e-5)
    assert lognormal_pairs(shares, torch.tensor([0.0, 1 - 2**-24])).tolist() == [0, 9]


@pytest.mark.parametrize(("curve", "share"), [(1.0, 0.36), (2.5, 0.18), (4.0, 0.11)])
def test_polynomial_pairs_are_noisier_than_lognormal_ones(curve: float, share: float) -> None:
    """Shares of a batch of 256 at 20 noises whose teacher has a noise of 10 or more, of the authors' formula."""
    noises, generator = karras_noises(CONSTANT, 20), torch.Generator().manual_seed(0)
    ranks, found = torch.arange(256) / 255, []
    for _ in range(50):
        pairs = polynomial_pairs(ranks, torch.randn(256, generator=generator), count=20, curve=curve)
        found.append(float((noises[pairs] >= 10).double().mean()))
    assert np.mean(found) == pytest.approx(share, abs=0.025)  # a batch's own share deviates by 0.01
    assert np.mean(found) > 0.057


def test_polynomial_pairs_are_places_moved_by_chance_within_the_grid() -> None:
    """N = 34: N^(1/5) is 2.02; places go up to 32, the last pair."""
    ranks = torch.tensor([0.0, 0.5, 0.5, 0.5, 0.95, 0.95, 1.0, 0.0])
    normal = torch.tensor([0.0, 0.0, -1.5, 40.0, 1.0, 1.5, 0.0, -3.0])
    moved = polynomial_pairs(ranks, normal, count=34, curve=2.0)
    assert moved.tolist() == [2, 10, 8, 8, 31, 28, 32, 0]  # the fourth and the last three stay where they were


@pytest.mark.parametrize("noises", ["lognormal", "polynomial"])
def test_pairs_do_not_depend_on_how_a_batch_is_cut(noises: str) -> None:
    config = ObjectiveConfig(kind="consistency", noises=noises)  # type: ignore[arg-type]
    grid = karras_noises(config, 41)
    whole = draw_pairs(config, grid, StepRandom(0, 5, 32))
    parts = [draw_pairs(config, grid, StepRandom(0, 5, 32, part=part, parts=4)) for part in range(4)]
    assert torch.equal(whole, torch.cat(parts))
    assert 0 <= int(whole.min()) and int(whole.max()) <= 39 and whole.dtype == torch.int64
    assert not torch.equal(whole, draw_pairs(config, grid, StepRandom(0, 6, 32)))


def test_polynomial_pairs_are_shuffled_over_the_batch() -> None:
    """Every place is taken once: without moves the pairs of a batch are those of its places."""
    config = ObjectiveConfig(kind="consistency", noises="polynomial", curve=1.0)
    pairs = draw_pairs(config, karras_noises(config, 1000), StepRandom(0, 0, 64))
    assert pairs.tolist() != sorted(pairs.tolist())
    places = (torch.arange(64) / 63 * 998).round()
    assert (pairs.sort().values - places).abs().max() < 10
    assert len(draw_pairs(config, karras_noises(config, 5), StepRandom(0, 0, 1))) == 1


# The parametrisation


def test_the_function_is_the_identity_at_sigma_min_to_the_bit() -> None:
    objective, generator = ConsistencyObjective(DOUBLING), torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        z, output = (torch.randn(64, 3, generator=generator, dtype=dtype) for _ in range(2))
        logsnr = torch.full((64,), -2 * math.log(0.002), dtype=dtype)
        alpha, _ = variance_preserving(logsnr)
        x = z / alpha[:, None]
        assert torch.equal(objective.to_x0(1e3 * output, z, logsnr), x)
        less = objective.to_x0(output, z, logsnr + 2)  # beyond the range
        torch.testing.assert_close(less, z, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_the_function_is_the_published_one(sigma_data: float) -> None:
    """c_skip x + c_out F of x0 + s eps; F sees c_in x."""
    objective, low, d = ConsistencyObjective(DOUBLING, sigma_data=sigma_data), 0.002, sigma_data
    generator = torch.Generator().manual_seed(0)
    x0, eps, output = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    s = torch.tensor([0.002001, 0.1, 1.0, 10.0, 80.0], dtype=torch.float64)[:, None]
    logsnr = (-2 * s.log())[:, 0]
    z, x = noised(x0, eps, logsnr), x0 + s * eps
    skip, out = d**2 / ((s - low) ** 2 + d**2), d * (s - low) / (s**2 + d**2).sqrt()
    torch.testing.assert_close(objective.to_x0(output, z, logsnr), skip * x + out * output)
    torch.testing.assert_close(objective.network_input(z, logsnr), x / (s**2 + d**2).sqrt())
    torch.testing.assert_close(objective.gain(logsnr), out[:, 0] ** 2)
    torch.testing.assert_close(objective.to_x0(objective.target_of(x0, eps, logsnr), z, logsnr), x0)


def test_the_function_is_finite_at_every_level() -> None:
    objective, z = ConsistencyObjective(DOUBLING), torch.ones(7, 2)
    logsnr = torch.tensor([-math.inf, -18.4, -8.764, 0.0, 12.4, 18.4, math.inf])
    for function in (objective.to_x0(z, z, logsnr), objective.network_input(z, logsnr), objective.gain(logsnr)):
        assert function.isfinite().all()


def test_a_card_without_an_objective_is_of_a_denoiser() -> None:
    assert type(build_objective({})) is Objective
    told = json.loads(json.dumps(to_dict(CONFIG)))
    built = build_objective(told)
    assert isinstance(built, ConsistencyObjective) and built.rest == 0.002


# The loss


def test_distances_are_the_closed_forms() -> None:
    x, y = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)
    x[0, 0, 0], x[0, 2, 3] = 3.0, -4.0
    c = 0.1 * math.sqrt(12)
    vector = pseudo_huber(x, y, scale=0.1, form="vector")
    torch.testing.assert_close(vector, torch.tensor([math.sqrt(25 + c * c) - c]))
    element = pseudo_huber(x, y, scale=0.1, form="element")
    torch.testing.assert_close(element, torch.tensor([(math.hypot(3, c) + math.hypot(4, c) - 2 * c) / 12]))


def test_small_distances_keep_their_digits() -> None:
    """|x - y|^2 / (2 c), whose difference of roots would be lost in single precision."""
    x = torch.full((2, 16), 1e-5)
    for form, square in (("vector", 16e-10), ("element", 1e-10)):
        found = pseudo_huber(x, torch.zeros(2, 16), scale=0.5, form=form)
        torch.testing.assert_close(found, torch.full((2,), square / 4.0), rtol=1e-5, atol=0)


class Scaled(nn.Module):
    """F = w x: its gradient can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, logsnr: Tensor, condition: Tensor) -> Tensor:
        return self.w * x


@pytest.mark.parametrize("objective", [SMALL, POLYNOMIAL], ids=["lognormal", "polynomial"])
def test_the_loss_is_that_of_neighbouring_noises_and_its_gradient_the_students(
    run: RunConfig, objective: ObjectiveConfig
) -> None:
    task, step = make_task(run, objective=objective), 2
    task.modules["network"] = network = Scaled()
    batch = open_shards(run.folder / "codes" / "train").load(np.arange(8))
    figures = task.step(batch, StepRandom(0, step, 8))
    figures["loss"].backward()

    rng, x0 = StepRandom(0, step, 8), batch["latents"].double()
    noises = noises_of(objective, noise_count(objective, step, TRAIN.steps))
    pairs, eps = draw_pairs(objective, noises, rng), rng.normal(*x0.shape[1:]).double()
    w = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def end(s: Tensor, weight: Tensor) -> Tensor:
        s = s[:, None, None, None]
        x = x0 + s * eps
        inner = weight * x / (s**2 + 1).sqrt()
        return x / ((s - 0.002) ** 2 + 1) + (s - 0.002) / (s**2 + 1).sqrt() * inner

    low, high = noises[pairs], noises[pairs + 1]
    gap = (end(high, w) - end(low, w.detach())).flatten(1)
    c = 0.00054 * math.sqrt(gap.shape[1])
    if objective.huber == "element":
        distances = ((gap**2 + c**2).sqrt() - c).mean(1)
    else:
        distances = (gap.square().sum(1) + c**2).sqrt() - c
    loss = (distances / (high - low)).mean()
    loss.backward()
    assert network.w.grad is not None and w.grad is not None
    torch.testing.assert_close(figures["loss"].double(), loss, rtol=1e-3, atol=0)
    torch.testing.assert_close(network.w.grad.double(), w.grad, rtol=1e-3, atol=0)
    torch.testing.assert_close(figures["distance"].double(), distances.mean(), rtol=1e-3, atol=0)
    assert float(figures["num_noises"]) == len(noises)
    assert float(figures["mean_log_sigma"]) == pytest.approx(float(high.log().mean()), abs=1e-5)


def test_the_students_gradient_survives_autocast(run: RunConfig) -> None:
    """Weights that autocast converts for the teacher, without gradient, must not be kept for the student."""
    task = make_task(run)
    nn.init.normal_(task.network.output.linear.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    batch = open_shards(run.folder / "codes" / "train").load(np.arange(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task.step(batch, StepRandom(0, 0, 8))["loss"]
    loss.backward()
    gradient = task.network.output.linear.weight.grad
    assert gradient is not None and float(gradient.abs().max()) > 0


@pytest.mark.parametrize("objective", [SMALL, POLYNOMIAL], ids=["lognormal", "polynomial"])
def test_validation_repeats_itself_at_the_last_noises(run: RunConfig, objective: ObjectiveConfig) -> None:
    train = dataclasses.replace(TRAIN, steps=8)
    task = make_task(run, objective=objective, train=train)
    seen: list[Tensor] = []
    ends = task.ends

    def spy(x0: Tensor, condition: Tensor, eps: Tensor, logsnr: Tensor) -> Tensor:
        seen.append(logsnr)
        return ends(x0, condition, eps, logsnr)

    task.ends = spy  # type: ignore[method-assign]
    with torch.no_grad():
        figures = task.validate()
        assert task.validate() == figures
    assert set(figures) == {"loss", "distance"} and figures["loss"] > figures["distance"] / 80
    last = (-2 * noises_of(objective, {"lognormal": 9, "polynomial": 8}[objective.noises]).log()).float()
    assert sum(len(each) for each in seen) == 2 * 2 * 24
    assert {float(level) for each in seen for level in each} <= {float(level) for level in last}


# Sampling


def gaussian_end(deviation: float, low: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact consistency function of data N(0, deviation^2): trajectories of the ODE are straight in x / r(s)."""

    def end(z: Tensor, logsnr: Tensor) -> Tensor:
        alpha, sigma = (value[:, None] for value in variance_preserving(logsnr.double()))
        return (z / alpha * ((deviation**2 + low**2) / (deviation**2 + (sigma / alpha) ** 2)).sqrt()).to(z)

    return end


@pytest.mark.parametrize("levels", [[-6.0], [-6.0, 0.0], [-6.0, -2.0, 0.5, 1.5]], ids=len)
def test_any_number_of_steps_samples_the_law_of_the_data(levels: list[float]) -> None:
    """With the exact function, data of unit variance and a large `rest`, which must be counted once."""
    rest = 0.4
    noise = SampleNoise([7], (200_000,))
    found = solve(
        gaussian_end(math.sqrt(1 - rest**2), rest), noise, torch.tensor(levels, dtype=torch.float64),
        solver="consistency", rest=rest, dtype=torch.float64,
    )  # fmt: skip
    start = math.sqrt((1 + math.exp(6.0)) / (1 - rest**2 + math.exp(6.0)))  # of a z that has unit variance
    expected = start if len(levels) == 1 else 1.0
    assert float(found.std()) == pytest.approx(expected, abs=6e-3)


def test_two_steps_go_to_the_end_and_back_with_new_noise() -> None:
    levels, low = torch.tensor([-8.0, 1.0], dtype=torch.float64), 0.3
    asked: list[tuple[Tensor, Tensor]] = []

    def end(z: Tensor, logsnr: Tensor) -> Tensor:
        asked.append((z, logsnr))
        return 0.5 * z + 1

    found = solve(end, SampleNoise([3], (4,)), levels, solver="consistency", rest=low, dtype=torch.float64)
    noise = SampleNoise([3], (4,))
    first, second = noise().double(), noise().double()
    tau = math.exp(-0.5)
    x = (0.5 * first + 1) + math.sqrt(tau**2 - low**2) * second
    torch.testing.assert_close(asked[1][0], x / math.sqrt(1 + tau**2))
    torch.testing.assert_close(found, 0.5 * asked[1][0] + 1)
    assert [float(logsnr[0]) for _, logsnr in asked] == [-8, 1]


def trained(run: RunConfig, device: Device, **changes: Any) -> Diffusion:
    folder = train_generator(run=run, data=DATA, config=with_changes(**changes), family="diffusion", device=device)
    generator = load_generator(folder, "diffusion")
    assert isinstance(generator, Diffusion)
    return generator


def test_a_training_samples_in_one_step_and_in_two(run: RunConfig, device: Device) -> None:
    objective = dataclasses.replace(SMALL, sigma_max=40.0)
    generator = trained(run, device, objective=objective)
    lines = records(run.folder / "diffusion")
    assert [line["num_noises"] for line in lines if "num_noises" in line] == [5, 9]
    assert lines[0]["curriculum/lowest_logsnr"] == pytest.approx(-2 * math.log(40))
    assert math.isfinite(lines[-1]["validation/loss"])
    levels = generator.levels(SAMPLE).tolist()
    assert levels[0] == -2 * math.log(40) and len(levels) == 2
    labels = torch.tensor([0, 1, 2])
    for num_steps in (1, 2):
        settings: dict[str, Any] = {"solver": "consistency", "num_steps": num_steps}
        whole = generator.sample(labels, [5, 6, 7], **settings)
        assert whole.isfinite().all() and whole.shape == (3, 4, 4, 4)
        torch.testing.assert_close(generator.sample(labels[1:], [6, 7], **settings), whole[1:])
    with pytest.raises(ValueError, match=r"sample\.solver=ddim follows .* set diffusion\.sample\.solver=consistency"):
        generator.sample(labels, [5, 6, 7])
    with pytest.raises(ValueError, match=r"first_logsnr=-8\.0 must lie in \[-7\.37776, 12\.4292\]"):
        generator.sample(labels, [5, 6, 7], solver="consistency", first_logsnr=-8.0)
    assert generator.features(torch.zeros(2, 4, 4, 4), ["block1"])["block1"].shape == (2, 32)


@pytest.mark.parametrize(
    ("sample", "told"),
    [
        ({"steps": "karras"}, r"steps=karras with num_steps=2 goes up to log SNR 10, but beyond 4\.60517"),
        ({"steps": "logsnr", "last_logsnr": 4.7}, r"log SNR 4\.7, .* sigma_min=0\.1"),
        ({"num_steps": 20}, r"steps=cosine with num_steps=20 goes up to log SNR 5\.1.*lower num_steps or last_logsnr"),
    ],
)
def test_steps_where_the_model_returns_its_input_are_refused(run: RunConfig, sample: dict[str, Any], told: str) -> None:
    objective = dataclasses.replace(SMALL, sigma_min=0.1)
    make_task(run, objective=objective)
    make_task(run, objective=objective, sample=dataclasses.replace(SAMPLE, steps="karras", last_logsnr=4.6))
    with pytest.raises(ValueError, match=told):
        make_task(run, objective=objective, sample=dataclasses.replace(SAMPLE, **sample))


def test_the_model_samples_as_its_solver_does(run: RunConfig, device: Device) -> None:
    generator = trained(run, device, objective=dataclasses.replace(SMALL, sigma_min=0.4))
    labels, levels = torch.tensor([0, 2]), generator.levels(SAMPLE)
    expected = solve(
        lambda z, logsnr: generator.denoise(z, logsnr, labels), SampleNoise([8, 9], (4, 4, 4)), levels,
        solver="consistency", rest=0.4,
    )  # fmt: skip
    torch.testing.assert_close(generator.sample(labels, [8, 9], solver="consistency", num_steps=2), expected)


def test_one_step_lands_on_the_data_after_a_short_training(run: RunConfig, device: Device) -> None:
    """Latents of class k lie around k - 1, with deviation 0.1."""
    train = dataclasses.replace(TRAIN, steps=200, batch_size=32, learning_rate=3e-3, log_every=50, preview_every=0,
                                checkpoint_every=200)  # fmt: skip
    generator = trained(run, device, train=train, objective=dataclasses.replace(SMALL, least=4, most=16))
    for label in range(3):
        for num_steps in (1, 2):
            found = generator.sample(torch.full((8,), label), range(8), solver="consistency", num_steps=num_steps)
            assert float((found - (label - 1)).square().mean().sqrt()) < 0.5, (label, num_steps)


def test_pixels_are_trained_on_and_sampled_too(tmp_path: Path, device: Device) -> None:
    run, data = RunConfig(name="pixels", root=str(tmp_path), device="cpu"), DataConfig(size=8, workers=0)
    settings: dict[str, Any] = {"run": run, "data": data, "device": device}
    pixels = TokenizerConfig(model=TokenizerModelConfig(architecture="pixels"))
    train_tokenizer(tokenizer=pixels, **settings)
    encode_images(tokenizer=pixels, **settings)
    config = with_changes(model=dataclasses.replace(MODEL, patch_size=4), objective=POLYNOMIAL)
    folder = train_generator(config=config, family="diffusion", **settings)
    latents = load_generator(folder, "diffusion").sample(None, [0, 1], solver="consistency", num_steps=1)
    assert latents.shape == (2, 3, 8, 8) and latents.isfinite().all()
    assert [path.name for path in (folder / "previews").iterdir()] == ["step-00000004-samples.png"]


def test_a_denoiser_does_not_guide_a_consistency_model(run: RunConfig, device: Device) -> None:
    denoiser = train_generator(
        run=run, data=DATA, config=DiffusionConfig(model=MODEL, train=TRAIN), family="diffusion", device=device
    )
    shutil.move(denoiser, run.folder / "denoiser")
    trained(run, device)
    guided = load_generator(run.folder, "diffusion", guide=str(run.folder / "denoiser"))
    settings = {"solver": "consistency", "num_steps": 1, "guidance": 2.0, "guide": "other"}
    with pytest.raises(ValueError, match=r"has diffusion\.objective\.kind=denoising, this generator consistency"):
        guided.sample(None, [0], **settings)
    with pytest.raises(ValueError, match=r"solver=consistency asks for a model"):
        load_generator(run.folder / "denoiser", "diffusion").sample(None, [0], solver="consistency")


@pytest.mark.parametrize("objective", [SMALL, POLYNOMIAL], ids=["lognormal", "polynomial"])
def test_an_interrupted_training_equals_an_uninterrupted_one(
    run: RunConfig, tmp_path: Path, device: Device, objective: ObjectiveConfig
) -> None:
    shutil.copytree(run.folder, tmp_path / "twin")
    train = dataclasses.replace(TRAIN, optimizer="radam", accumulate=2)
    settings: dict[str, Any] = {"data": DATA, "config": with_changes(objective=objective, train=train)}
    straight = train_generator(run=run, device=device, family="diffusion", **settings)
    shutil.copytree(straight, tmp_path / "twin" / "diffusion")
    for path in (tmp_path / "twin" / "diffusion").glob("model.*"):
        path.unlink()
    newest = max((tmp_path / "twin" / "diffusion" / "checkpoints").iterdir(), key=lambda folder: folder.name)
    shutil.rmtree(newest)
    twin = dataclasses.replace(run, name="twin")
    resumed = train_generator(run=twin, device=device, family="diffusion", **settings)
    (_, first), (_, second) = load_model(straight), load_model(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    times = {"samples_per_second"}
    told = [[{k: v for k, v in line.items() if k not in times} for line in records(f)] for f in (straight, resumed)]
    assert told[0] == told[1]


def train_here(root: str, name: str, parallel: str) -> None:
    """The training of one process of several."""
    run = RunConfig(name=name, root=root, device="cpu", precision="fp32", threads=1, parallel=parallel)  # type: ignore[arg-type]
    config = with_changes(objective=POLYNOMIAL, train=dataclasses.replace(TRAIN, optimizer="radam"))
    train_generator(run=run, data=DATA, config=config, family="diffusion", device=setup(run))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one(run: RunConfig, tmp_path: Path, parallel: str) -> None:
    """The teacher's forward pass between the student's and the gradient's must not hinder what they exchange."""
    shutil.copytree(run.folder, tmp_path / "two")
    train_here(run.root, run.name, "ddp")
    sys.path.insert(0, str(Path(__file__).parent))
    forked.run_two(f"{Path(__file__).stem}:train_here", str(tmp_path), "two", parallel, told=tmp_path / "told")
    (_, one), (_, two) = load_model(run.folder / "diffusion"), load_model(tmp_path / "two" / "diffusion")
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4


# What is refused


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"path": "ve"}, r"diffusion\.path has no effect with diffusion\.objective\.kind=consistency"),
        ({"target": "eps"}, r"diffusion\.target"),
        ({"weight": "min_snr"}, r"diffusion\.weight "),
        ({"schedule": ScheduleConfig(kind="edm")}, r"diffusion\.schedule"),
        ({"curriculum": CurriculumConfig(kind="progressive")}, r"diffusion\.curriculum"),
        ({"sample": DiffusionSampleConfig()}, r"set diffusion\.sample\.solver=consistency"),
        ({"sample": dataclasses.replace(SAMPLE, steps="time")}, r"steps=time is of denoisers"),
        ({"sample": dataclasses.replace(SAMPLE, from_zero_snr=True)}, r"sigma_max=80\.0"),
        ({"sample": dataclasses.replace(SAMPLE, first_logsnr=-9.0)}, r"first_logsnr=-9\.0"),
        ({"sample": dataclasses.replace(SAMPLE, steps="list", levels=(-9.0, 0.0))}, r"levels=-9\.0"),
        ({"objective": ObjectiveConfig()}, r"kind=consistency, and this one is not: choose another solver"),
    ],
)
def test_what_does_not_go_with_the_objective_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        with_changes(**changes)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"curve": 2.0}, r"objective\.curve=2\.0 has no effect here: it needs diffusion\.objective\.kind=consistency"),
        ({"kind": "consistency", "curve": 2.0}, r"noises=polynomial"),
        ({"kind": "consistency", "noises": "polynomial", "mean": 0.0}, r"mean=0\.0 .*noises=lognormal"),
        ({"kind": "consistency", "noises": "polynomial", "deviation": 1.0}, r"deviation=1\.0"),
        ({"kind": "consistency", "discretisation": "constant", "most": 30}, r"most=30 .*=doubling or sinusoidal"),
        ({"kind": "consistency", "discretisation": "constant", "predefined": True}, r"predefined=True"),
        ({"kind": "consistency", "least": 1}, r"least=1 must be at least 2"),
        ({"kind": "consistency", "least": 30, "most": 20}, r"least=30 must be at most"),
        ({"kind": "consistency", "sigma_min": 0.0}, r"sigma_min=0\.0"),
        ({"kind": "consistency", "sigma_max": 0.001}, r"sigma_max=0\.001"),
        ({"kind": "consistency", "sigma_max": math.inf}, r"must be finite"),
        ({"kind": "consistency", "sigma_max": 2e4}, r"sigma_max=20000\.0 must rise between 0\.0001 and 10000"),
        ({"kind": "consistency", "rho": 0.0}, r"rho=0\.0 must be positive"),
        ({"kind": "consistency", "discretisation": "sinusoidal", "rho": 1.0}, r"rho=1\.0 must be above 1"),
        ({"kind": "consistency", "mean": 30.0}, r"mean=30\.0 with deviation=2\.0 draws no noises between"),
        ({"kind": "consistency", "mean": -11.1, "deviation": 0.5}, r"mean=-11\.1 .*: mean is one of ln sigma"),
        ({"kind": "consistency", "huber_scale": 0.0}, r"huber_scale=0\.0 must be positive"),
        ({"kind": "consistency", "huber": "whole"}, r"vector, element"),
    ],
)
def test_wrong_keys_are_refused(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ObjectiveConfig(**keys)


def test_every_discretisation_has_a_row() -> None:
    assert set(COUNTS) == {"constant", "doubling", "sinusoidal"}


def test_sigma_data_is_of_consistency_models_too() -> None:
    assert with_changes(sigma_data=0.5).sigma_data == 0.5
