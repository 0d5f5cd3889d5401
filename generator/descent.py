"""Coordinate descent over the stops of a solver: each in turn moves to the best of a few places between its neighbours.

Zeroth order, as in Align Your Steps (Sabour et al., 2024, algorithm 1). Stops are log SNRs that rise from where
sampling starts to where its last step ends. What is minimised is a sum over steps, so that a stop has a part in two
terms alone, and each stop that moves lowers it: a sum over fixed draws never rises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

# (log SNR of a stop, log SNR of the next one) -> what the step between them costs
Cost = Callable[[float, float], float]
FARTHEST = 0.5  # of the way to a neighbour: the candidates farthest away
NEARER = 0.2  # each candidate lies so much nearer than the one before
LEAST_GAIN = 1e-9  # share by which a stop must lower its two terms to move: less may be rounding


def total(stops: Sequence[float], cost: Cost) -> float:
    """What all steps cost."""
    return math.fsum(cost(here, there) for here, there in pairwise(stops))


def sweep(
    stops: Sequence[float], cost: Cost, free: Iterable[int], *, candidates: int, each: Callable[[], None] = lambda: None
) -> list[float]:
    """The stops after each of the `free` ones, by index, has moved once; `each` is called after every one."""
    found = list(stops)
    for index in free:
        found[index] = best_place(found[index - 1], found[index], found[index + 1], cost, candidates)
        each()
    return found


def best_place(before: float, here: float, after: float, cost: Cost, candidates: int) -> float:
    """The best of the candidates for a stop between its neighbours; itself unless another is better."""
    found = places(before, here, after, candidates)
    arriving = [cost(before, place) for place in found]  # one after the other: these begin at the same stop
    leaving = [cost(place, after) for place in found]
    costs = [math.fsum(pair) for pair in zip(arriving, leaving, strict=True)]
    best = min(range(len(found)), key=costs.__getitem__)
    return found[best] if costs[best] < costs[0] * (1 - LEAST_GAIN) else here


def places(before: float, here: float, after: float, candidates: int) -> list[float]:
    """A stop and `candidates` - 1 other places for it, as many on either side, closer and closer to it."""
    ways = [FARTHEST * NEARER**number for number in range(candidates // 2)]
    return [here, *(here + way * (neighbour - here) for neighbour in (before, after) for way in ways)]


def halved(stops: Sequence[float]) -> list[float]:
    """The stops with a new one in the middle of each two: log t_{2i+1} = (log t_i + log t_{i+1}) / 2."""
    middles = [(here + there) / 2 for here, there in pairwise(stops)]
    return [*(stop for pair in zip(stops, middles, strict=False) for stop in pair), stops[-1]]
