"""Targets hold the same knowledge on every path, and a weight means the same for all of them."""

from __future__ import annotations

import itertools
import math
import typing
from typing import Any

import pytest
import torch
from torch import Tensor

from generator.config import DiffusionConfig
from generator.objective import TARGETS, WEIGHTS, Objective
from generator.path import PATHS, beside, noise_to_signal, noised, variance_preserving
from generator.schedule import MAX_LOGSNR

LOGSNR = torch.linspace(-10, 10, 21, dtype=torch.float64)
X0, EPS = torch.randn(2, len(LOGSNR), 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Z = noised(X0, EPS, LOGSNR)
ALPHA, SIGMA = (beside(value, X0) for value in variance_preserving(LOGSNR))
PAIRS = list(itertools.product(PATHS, TARGETS))
WEIGHED = [name for name, weight in WEIGHTS.items() if weight is not None]


def target_of(**settings: Any) -> Tensor:
    return Objective(**settings).target_of(X0, EPS, LOGSNR)


def test_every_choice_has_a_row() -> None:
    hints = typing.get_type_hints(DiffusionConfig)
    assert set(typing.get_args(hints["target"])) == set(TARGETS)
    assert set(typing.get_args(hints["weight"])) == set(WEIGHTS)


@pytest.mark.parametrize(("path", "target"), PAIRS)
def test_conversions_round_trip(path: str, target: str) -> None:
    for sigma_data in (0.5, 1.0):
        objective = Objective(path=path, target=target, sigma_data=sigma_data)
        x0 = objective.to_x0(objective.target_of(X0, EPS, LOGSNR), Z, LOGSNR)
        torch.testing.assert_close(x0, X0, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("path", "target"), PAIRS)
def test_conversions_round_trip_in_single_precision_over_the_range_of_training(path: str, target: str) -> None:
    """x0 itself where there is signal, else the noisy latents that it explains."""
    x0, eps = X0.float(), EPS.float()
    logsnr = torch.linspace(-MAX_LOGSNR, MAX_LOGSNR, len(x0))
    objective, z = Objective(path=path, target=target), noised(x0, eps, logsnr)
    found = objective.to_x0(objective.target_of(x0, eps, logsnr), z, logsnr)
    alpha = beside(variance_preserving(logsnr)[0], x0)
    torch.testing.assert_close(alpha * found, alpha * x0, rtol=1e-5, atol=2e-6)


def test_targets_are_those_of_the_papers() -> None:
    torch.testing.assert_close(target_of(target="eps"), EPS)
    torch.testing.assert_close(target_of(target="x0"), X0)
    v = target_of(target="v")
    torch.testing.assert_close(ALPHA * Z - SIGMA * v, X0)
    torch.testing.assert_close(SIGMA * Z + ALPHA * v, EPS)
    torch.testing.assert_close(target_of(path="vp", target="velocity"), v)
    torch.testing.assert_close(target_of(path="gvp", target="velocity"), v * math.pi / 2)
    torch.testing.assert_close(target_of(path="flow", target="velocity"), EPS - X0)
    torch.testing.assert_close(target_of(path="ve", target="velocity"), EPS)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_f_is_the_output_of_edm_s_preconditioning(path: str, sigma_data: float) -> None:
    """Karras et al. (2022), table 1: D = c_skip x + c_out F."""
    s = beside(noise_to_signal(LOGSNR), X0)
    c_skip = sigma_data**2 / (s**2 + sigma_data**2)
    c_out = s * sigma_data / (s**2 + sigma_data**2).sqrt()
    f = target_of(path=path, target="F", sigma_data=sigma_data)
    torch.testing.assert_close(c_skip * (X0 + s * EPS) + c_out * f, X0)


def test_edm_with_unit_data_is_v_prediction() -> None:
    edm = Objective(path="ve", target="F")
    torch.testing.assert_close(edm.network_input(Z, LOGSNR), Z)
    torch.testing.assert_close(target_of(path="ve", target="F"), -target_of(target="v"))
    torch.testing.assert_close(edm.gain(LOGSNR), Objective(target="v").gain(LOGSNR))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", ["x0", "v", "F"])
def test_without_any_signal_the_output_alone_says_x0(path: str, target: str) -> None:
    end, objective = torch.full((len(X0),), -math.inf), Objective(path=path, target=target, sigma_data=0.5)
    assert torch.equal(objective.network_input(EPS, end), EPS)
    torch.testing.assert_close(objective.to_x0(objective.target_of(X0, EPS, end), EPS, end), X0)


@pytest.mark.parametrize(("path", "target"), PAIRS)
def test_almost_without_noise_x0_is_what_is_seen_or_said(path: str, target: str) -> None:
    """Where sigma has no float32 any more; solvers may ask there."""
    objective, x0 = Objective(path=path, target=target), X0[:4].float()
    logsnr = torch.tensor([60.0, 120.0, 400.0, math.inf])
    torch.testing.assert_close(objective.to_x0(objective.target_of(x0, x0 + 1, logsnr), x0, logsnr), x0)


# Gains and weights


@pytest.mark.parametrize(("path", "target"), PAIRS)
def test_gain_turns_an_output_error_into_an_x0_error(path: str, target: str) -> None:
    objective = Objective(path=path, target=target, sigma_data=0.7)
    error = objective.to_x0(objective.target_of(X0, EPS, LOGSNR) + 0.5, Z, LOGSNR) - X0
    torch.testing.assert_close(error.square().mean((1, 2, 3)), 0.25 * objective.gain(LOGSNR))


def test_gains_of_variance_preserving_targets() -> None:
    torch.testing.assert_close(Objective(target="eps").gain(LOGSNR), torch.exp(-LOGSNR))
    torch.testing.assert_close(Objective(target="v").gain(LOGSNR), torch.sigmoid(-LOGSNR))
    torch.testing.assert_close(Objective(target="x0").gain(LOGSNR), torch.ones_like(LOGSNR))


@pytest.mark.parametrize("weight", WEIGHED)
def test_a_weighted_error_is_the_same_whatever_is_predicted(weight: str) -> None:
    """Of one estimate of x0, expressed by every target on every path."""
    estimate = X0 + 0.1 * EPS.flip(0)
    losses = []
    for path, target in PAIRS:
        objective = Objective(path=path, target=target, weight=weight, sigma_data=0.5)
        output = objective.target_of(estimate, (Z - ALPHA * estimate) / SIGMA, LOGSNR)
        error = (output - objective.target_of(X0, EPS, LOGSNR)).square().mean((1, 2, 3))
        losses.append(objective.weight(LOGSNR) * error)
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-7, atol=0)


def test_plain_weights_are_one() -> None:
    for weight in ("plain", "learned"):
        torch.testing.assert_close(Objective(target="eps", weight=weight).weight(LOGSNR), torch.ones_like(LOGSNR))


@pytest.mark.parametrize("gamma", [None, 1.0, 20.0])
def test_min_snr_has_its_official_values(gamma: float | None) -> None:
    """Hang et al. (2023): eps min(S, g) / S, v min(S, g) / (S + 1), x0 min(S, g), with g = 5."""
    snr, g = torch.tensor([1e-3, 0.2, 1.0, 4.9, 5.1, 30.0, 1e4], dtype=torch.float64), gamma or 5.0
    capped = snr.clamp(max=g)
    for target, expected in (("eps", capped / snr), ("v", capped / (snr + 1)), ("x0", capped)):
        objective = Objective(target=target, weight="min_snr", weight_gamma=gamma)
        torch.testing.assert_close(objective.weight(snr.log()), expected)


@pytest.mark.parametrize("weight", ["min_snr", "soft_min_snr"])
def test_without_any_signal_min_snr_of_v_is_finite(weight: str) -> None:
    value = Objective(target="v", weight=weight).weight(torch.tensor([-math.inf, -MAX_LOGSNR]))
    assert 0 <= float(value[0]) == float(value[1]) < 1e-7


def test_other_weights_have_their_published_forms() -> None:
    snr, s = LOGSNR.exp(), noise_to_signal(LOGSNR)
    soft = Objective(target="x0", weight="soft_min_snr").weight(LOGSNR)
    torch.testing.assert_close(soft, snr * 5 / (snr + 5))
    for gamma in (0.5, 1.0):
        p2 = Objective(target="eps", weight="p2", weight_gamma=gamma).weight(LOGSNR)
        torch.testing.assert_close(p2, 1 / (1 + snr) ** gamma)
    torch.testing.assert_close(Objective(target="eps", weight="p2").weight(LOGSNR), 1 / (1 + snr))
    edm = Objective(target="x0", weight="edm", sigma_data=0.5).weight(LOGSNR)
    torch.testing.assert_close(edm, (s**2 + 0.5**2) / (s * 0.5) ** 2)


def test_edm_s_weight_makes_f_count_alike_everywhere() -> None:
    for path in PATHS:
        weight = Objective(path=path, target="F", weight="edm", sigma_data=0.5).weight(LOGSNR)
        torch.testing.assert_close(weight, torch.ones_like(weight))


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("path", PATHS)
def test_weights_are_finite_and_exact_in_single_precision(weight: str, path: str) -> None:
    logsnr = torch.linspace(-MAX_LOGSNR, MAX_LOGSNR, 201).clamp(-MAX_LOGSNR, MAX_LOGSNR)
    targets = [target for one, target in PAIRS if one == path]
    for target, sigma_data, gamma in itertools.product(targets, (0.05, 1.0, 20.0), (None, 0.5, 8.0)):
        objective = Objective(path=path, target=target, weight=weight, weight_gamma=gamma, sigma_data=sigma_data)
        expected = objective.weight(logsnr.double()).float()
        assert bool(expected.isfinite().all() and (expected >= 0).all())
        torch.testing.assert_close(objective.weight(logsnr), expected, rtol=1e-4, atol=1e-30)


# Choices


def test_a_card_without_the_newer_keys_has_their_defaults() -> None:
    told = {"path": "flow", "target": "velocity", "model": {}, "schedule": {"kind": "cosine"}}
    old, new = Objective.from_config(told), Objective(path="flow", target="velocity")
    assert vars(old) == vars(new)
    assert vars(Objective.from_config({})) == vars(Objective())


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"diffusion\.path='straight' is unknown; choose one of vp, flow, gvp, ve"):
        Objective(path="straight")
    with pytest.raises(ValueError, match=r"diffusion\.target='score' is unknown"):
        Objective(target="score")
    with pytest.raises(ValueError, match=r"diffusion\.weight='snr' is unknown"):
        Objective(weight="snr")
