"""Whether numbered things come in the order of their numbers: Kendall's tau over several groups, with an exact test."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

MOST_EXACT = 8  # things of which all orders are tried, 40,320
RANDOM_ORDERS = 20_000  # tried where there are more
BLOCK = 1000  # orders at a time


class Order(NamedTuple):
    """What `rank_order` finds."""

    tau: float
    """Mean over the groups, -1 (values fall with the number) to 1 (they rise)."""
    by_group: dict[int, float]
    p: float
    least_p: float
    """The p of a perfect order of so many things: less cannot be had."""
    num: int
    """Things that have values."""


def rank_order(groups: Mapping[int, Mapping[int, float]]) -> Order | None:
    """Kendall's tau-b between numbers and values in each group, its mean, and a two-sided permutation test of that.

    `groups` holds values by number, by group, such as steps by cluster by seed; a number may lack in a group. The test
    renumbers the things alike in all groups: a thing's value comes back from group to group, and groups do not make it
    more surprising that things which differ lie in this order. Exact up to MOST_EXACT things. None: no group has two
    different values.
    """
    numbers = sorted({number for values in groups.values() for number in values})
    tables = {group: _signs([values.get(number, math.nan) for number in numbers]) for group, values in groups.items()}
    scaled = {group: table / _scale(table, len(groups[group])) for group, table in tables.items() if table.any()}
    if not scaled:
        return None
    orders = _orders(len(numbers))  # [K, N]; the first is the numbers' own
    mean = np.mean(list(scaled.values()), axis=0)
    blocks = np.array_split(orders, -(-len(orders) // BLOCK))
    taus = np.concatenate([_taus(block, mean) for block in blocks])  # [K]
    p = float((np.abs(taus) >= abs(taus[0]) - 1e-9).mean())
    least = 2 / math.factorial(len(numbers)) if len(numbers) <= MOST_EXACT else 1 / len(orders)
    by_group = {group: float(_taus(orders[:1], table)[0]) for group, table in scaled.items()}
    return Order(float(taus[0]), by_group, p, least, len(numbers))


def kendall_tau(values: Sequence[float]) -> float:
    """Tau-b (Kendall, 1945) between values and their positions, from -1 (they fall) to 1; nan if all are equal."""
    signs = _signs(values)
    if not signs.any():
        return math.nan
    return float(_taus(np.arange(len(values))[None], signs / _scale(signs, len(values)))[0])


def _orders(count: int) -> np.ndarray:
    """All orders of `count` things, or many random ones after their own: int64 [K, N]."""
    if count <= MOST_EXACT:
        return np.array(list(itertools.permutations(range(count))))
    random = np.random.default_rng(0)
    return np.stack([np.arange(count), *(random.permutation(count) for _ in range(RANDOM_ORDERS - 1))])


def _taus(orders: np.ndarray, scaled: np.ndarray) -> np.ndarray:
    """Tau of each order [K, N] against the scaled signs [N, N] of the values: [K]."""
    higher = np.sign(orders[:, :, None] - orders[:, None, :])  # [K, N, N]
    return np.einsum("kij,ij->k", higher, scaled) / 2


def _signs(values: Sequence[float]) -> np.ndarray:
    """Of all pairs, 1 where the first has the higher value and -1 where the lower; 0 where one is nan: [N, N]."""
    column = np.array(values)
    return np.nan_to_num(np.sign(column[:, None] - column[None, :]))


def _scale(signs: np.ndarray, count: int) -> float:
    """sqrt(n0 (n0 - n1)): n0 pairs of `count` values, of which n1 are tied. Numbers themselves are never tied."""
    pairs = count * (count - 1) / 2
    return math.sqrt(pairs * float(np.abs(signs).sum()) / 2)
