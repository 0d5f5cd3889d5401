"""Kendall's tau over groups, and its permutation test."""

import math

import pytest
import scipy.stats

from tokenloom.rank_order import RANDOM_ORDERS, kendall_tau, rank_order

FALLING = {1: 50.0, 2: 40.0, 3: 30.0, 4: 20.0, 5: 10.0}


def test_a_perfect_order_has_the_least_p_however_many_groups_show_it() -> None:
    for groups in ({0: FALLING}, dict.fromkeys(range(5), FALLING)):
        found = rank_order(groups)
        assert found is not None and found.tau == -1 and found.p == found.least_p == 2 / math.factorial(5)
        assert found.by_group == dict.fromkeys(groups, -1.0) and found.num == 5


def test_one_group_is_kendalls_exact_test() -> None:
    values = {1: 0.3, 2: 0.1, 3: 0.9, 4: 0.5, 5: 0.7, 6: 0.8}
    found, expected = rank_order({0: values}), scipy.stats.kendalltau(list(values), list(values.values()))
    assert found is not None
    assert (found.tau, found.p) == pytest.approx((expected.statistic, expected.pvalue))


def test_ties_are_counted_as_in_tau_b() -> None:
    values = [1.0, 1.0, 2.0, 5.0, 2.0, 2.0, 7.0]
    expected = scipy.stats.kendalltau(range(7), values).statistic
    found = rank_order({0: dict(enumerate(values))})
    assert found is not None and found.tau == pytest.approx(expected) and kendall_tau(values) == pytest.approx(expected)


def test_groups_count_alike_and_a_thing_may_lack_in_one() -> None:
    found = rank_order({0: {1: 1.0, 2: 2.0, 3: 3.0}, 1: {1: 2.0, 2: 1.0}})
    assert found is not None and found.by_group == {0: 1, 1: -1} and abs(found.tau) < 1e-12 and found.p == 1


def test_things_that_merely_differ_are_not_in_order() -> None:
    """The same values in every group, in no order: many groups do not make p small."""
    values = {1: 1.0, 2: 5.0, 3: 2.0, 4: 3.0, 5: 4.0}
    found = rank_order(dict.fromkeys(range(10), values))
    assert found is not None and found.tau == pytest.approx(0.4) and found.p > 0.4


def test_many_things_are_tested_on_random_orders() -> None:
    found = rank_order({0: {number: float(number**2) for number in range(12)}})
    assert found is not None and found.tau == pytest.approx(1) and found.p == found.least_p == 1 / RANDOM_ORDERS
    assert rank_order({0: {number: float(number % 5) for number in range(12)}}) is not None


def test_nothing_to_compare_has_no_order() -> None:
    assert rank_order({}) is None and rank_order({0: {}, 1: {1: 3.0}, 2: {1: 2.0, 2: 2.0}}) is None
    assert math.isnan(kendall_tau([2.0, 2.0]))
