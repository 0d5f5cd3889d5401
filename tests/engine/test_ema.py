import pytest
import torch
from torch import Tensor, nn

from engine.ema import Average, Ema, PowerEma, power_exponent


class Numbers(nn.Module):
    """A network that is one vector of weights."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num, dtype=torch.float64))


def shares(average: Average, module: Numbers) -> Tensor:
    """What the weights before the first update, and those of each of the next updates, count in the average [n + 1]."""
    num = len(module.weight)
    units = torch.eye(num, dtype=torch.float64)
    average.shadow = [units[0].clone()]
    for update in range(1, num):
        module.weight.data = units[update]
        average.update(module)
    return average.shadow[0]


def relative_width(weights: Tensor) -> Tensor:
    """Standard deviation of the time of the weights that an average holds, over their number."""
    times = torch.arange(len(weights)) / len(weights)
    mean = (weights * times).sum()
    return (weights * (times - mean).square()).sum().sqrt()


def test_the_average_follows_the_warmed_up_formula() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    average, expected = Ema(module, 0.5), 1.0
    for count, value in enumerate([3.0, 5.0, -2.0, 8.0, 1.0, 1.0, 1.0, 7.0, 2.0, 4.0], start=1):
        nn.init.constant_(module.weight, value)
        average.update(module)
        decay = min(0.5, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * value
        assert torch.isclose(average.shadow[0], torch.tensor([[expected]])).all()


def test_the_warm_up_of_a_slow_average_is_a_power_function_of_width_009() -> None:
    """Update i of n weighs 9 (i + 2) ... (i + 9) / ((n + 2) ... (n + 10)): the product of the shares telescopes."""
    module = Numbers(1001)
    found, n = shares(Ema(module, 0.9999), module), 1000
    i = torch.arange(1, n + 1, dtype=torch.float64)
    above, below = (
        torch.stack([m + k for k in terms]).log().sum(0)
        for m, terms in ((i, range(2, 10)), (torch.tensor(n).double(), range(2, 11)))
    )
    torch.testing.assert_close(found[1:], 9 * (above - below).exp(), rtol=1e-9, atol=0)
    assert found.sum() == pytest.approx(1) and found[0] < 1e-20
    assert relative_width(found) == pytest.approx(0.0905, abs=5e-4)
    assert power_exponent(0.09045) == pytest.approx(8, abs=1e-2)
    assert found[:500].sum() == pytest.approx(0.5**9, rel=0.1)  # the first half of the training has gone


def test_the_warm_up_of_a_slow_average_ends_after_90_000_updates() -> None:
    average = Ema(nn.Linear(1, 1), 0.9999)
    assert average.decay_at(89_980) < 0.9999
    assert {average.decay_at(update) for update in (89_991, 10**6)} == {0.9999}


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponent_of_a_width_is_the_published_one(width: float, gamma: float) -> None:
    assert power_exponent(width) == pytest.approx(gamma, abs=5e-3)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.279])
def test_a_profile_with_this_exponent_has_this_width(width: float) -> None:
    gamma = power_exponent(width)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)  # of time under (gamma + 1) t^gamma on [0, 1]
    assert (square - mean**2) ** 0.5 == pytest.approx(width, rel=1e-6)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_a_power_average_weighs_updates_by_their_time_and_forgets_the_start(width: float) -> None:
    module = Numbers(401)
    average = PowerEma(module, width)
    found, power = shares(average, module), average.gamma + 1
    edges = (torch.arange(401, dtype=torch.float64) / 400) ** power
    torch.testing.assert_close(found[1:], edges.diff(), rtol=1e-6, atol=1e-15)
    assert found[0] == 0
    assert relative_width(found) == pytest.approx(width, rel=0.02)


def test_the_first_update_of_a_power_average_takes_the_weights_themselves() -> None:
    module = nn.Linear(3, 2)
    average = PowerEma(module, 0.1)
    with torch.no_grad():
        module.weight.mul_(3.7)
    average.update(module)
    assert all(torch.equal(shadow, own) for shadow, own in zip(average.shadow, module.parameters(), strict=True))


def test_averaged_weights_are_lent_and_taken_back() -> None:
    module = nn.Linear(2, 2)
    average = Ema(module, 0.9)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    own = [parameter.clone() for parameter in module.parameters()]
    averaged = [shadow.clone() for shadow in average.shadow]
    with average.applied(module):
        assert all(torch.equal(p, a) for p, a in zip(module.parameters(), averaged, strict=True))
    assert all(torch.equal(p, o) for p, o in zip(module.parameters(), own, strict=True))
    assert all(torch.equal(s, a) for s, a in zip(average.shadow, averaged, strict=True))
