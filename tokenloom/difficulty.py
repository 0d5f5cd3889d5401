"""Which noise levels are hard: difficulty.json, difficulty.md and difficulty.png in the folder of a study.

Conclusions are computed: they say what the measures and their tests do, not what they are expected to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.checkpoint import write_atomic, write_json
from eval.statistics import Estimate
from tokenloom.difficulty_entropies import Entropies
from tokenloom.difficulty_measures import (
    HELD_OUT,
    SHARE,
    Cluster,
    Convergence,
    Difficulty,
    check_copies,
    measure,
    over_seeds,
)
from tokenloom.difficulty_plot import difficulty_plot
from tokenloom.rank_order import MOST_EXACT, RANDOM_ORDERS, Order
from tokenloom.score_table import written
from tokenloom.study_config import StudyConfig
from tokenloom.study_course import course
from tokenloom.study_markdown import markdown_table
from tokenloom.study_plan import Row, Run
from tokenloom.study_statistics import stated

SIGNIFICANT = 0.05
ERRORS = 3.0  # standard errors by which neighbouring levels must differ to count as risen or fallen
DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def check_difficulty(study: StudyConfig, rows: Sequence[Row]) -> None:
    """Raise ValueError if a study asks for the difficulty of clusters that its rows do not train one by one."""
    if study.difficulty:
        check_copies(study, rows)


def write_difficulty(
    study: StudyConfig, rows: Sequence[Row], runs: Sequence[Run], problems: dict[str, str], folder: Path
) -> Path:
    """Measure what the finished runs without problems tell, and write the three files; returns difficulty.md."""
    told = measure(study, rows, runs, left_out=list(problems))
    write_json(folder / "difficulty.json", difficulty_json(told))
    write_atomic(folder / "difficulty.png", difficulty_plot(told, title=study.title))
    write_atomic(folder / "difficulty.md", difficulty_markdown(told, title=study.title).encode())
    return folder / "difficulty.md"


# Conclusions


def told_order(order: Order | None, name: str) -> str:
    """Whether clusters converge in the order of their noise, as the sign of tau and its p say."""
    if order is None:
        return f"By {name}, no order can be told: there are no two clusters that differ."
    figures = f"Kendall's tau {_signed(order.tau)}, p {order.p:.2g}"
    if order.p <= SIGNIFICANT:
        which = "noisier clusters converge sooner" if order.tau < 0 else "less noisy clusters converge sooner"
        return f"By {name}, {which} ({figures})."
    few = f"; {order.num} clusters are too few to show one" if order.least_p > SIGNIFICANT else ""
    return f"By {name}, no order of clusters by noise can be told ({figures}{few})."


def told_shape(found: Entropies) -> str:
    """How the relative entropy goes with noise: by its neighbouring levels, its tau and its place of the largest."""
    steps = list(zip(found.estimates, found.estimates[1:], strict=False))
    reaches = [ERRORS * math.hypot(before.error, after.error) for before, after in steps]
    changes = [after.value - before.value for before, after in steps]
    rises = sum(change > reach for change, reach in zip(changes, reaches, strict=True))
    falls = sum(change < -reach for change, reach in zip(changes, reaches, strict=True))
    if not rises and not falls:
        shape = "shows no change with noise beyond its errors"
    elif not rises:
        shape = "falls with noise throughout"
    elif not falls:
        shape = "rises with noise throughout"
    else:
        counts = f"of {len(steps)} steps between neighbouring levels {rises} rise and {falls} fall"
        shape = f"is not monotone in noise: {counts}"
    most = max(range(len(found.times)), key=lambda index: found.estimates[index].value)
    where = f"largest at time {found.times[most]:.3g}, in cluster {found.clusters[most]}"
    tau = f"Kendall's tau with time {_signed(found.tau)}"
    return f"The relative entropy of consecutive marginals {shape} ({tau}); it is {where}."


def conclusions(told: Difficulty) -> list[str]:
    """One sentence for each measure."""
    sentences = [told_order(each.order, each.label) for each in _measures(told)]
    return sentences + ([told_shape(told.entropies)] if told.entropies else [])


# Files


def difficulty_json(told: Difficulty) -> dict[str, Any]:
    """All curves, steps, orders and relative entropies, JSON-ready."""
    return {
        "share_of_fall": SHARE,
        "conclusions": conclusions(told),
        "clusters": {str(cluster.number): _cluster_json(told, cluster) for cluster in told.clusters},
        "order": {each.name: each.order and each.order._asdict() for each in _measures(told)},
        "relative_entropy": told.entropies and _entropies_json(told.entropies),
        "fixed_model": told.fixed,
        "missing": told.missing,
    }


def difficulty_markdown(told: Difficulty, *, title: str) -> str:
    """Conclusions, a table of the clusters, and how it all was measured."""
    parts = [
        f"# {title}: which noise levels are hard", "\n".join(f"- {sentence}" for sentence in conclusions(told)),
        _table(told), _told_convergence(told), _told_entropies(told), "![Both measures of difficulty](difficulty.png)",
    ]  # fmt: skip
    if told.missing:
        parts.append("## What is missing\n\n" + "\n".join(f"- {each}" for each in told.missing))
    return "\n\n".join(part for part in parts if part) + "\n"


def _cluster_json(told: Difficulty, cluster: Cluster) -> dict[str, Any]:
    found: dict[str, Any] = {"row": cluster.row, "times": list(cluster.times), "log_snrs": list(cluster.levels)}
    for each in _measures(told):
        curve = {str(step): stated(mean) for step, mean in course(each.curves(cluster.number)).items()}
        steps, falls = each.steps(cluster.number), each.falls(cluster.number)
        found[each.name] = {
            "normalised": curve,
            "steps_by_seed": {str(seed): value for seed, value in steps.items()},
            "steps": stated(over_seeds(steps)),
            "fall": stated(over_seeds(falls)),
        }
    if told.score is not None:
        found["final_minus_fixed_model"] = stated(told.gaps.get(cluster.number))
    return found


def _entropies_json(found: Entropies) -> dict[str, Any]:
    return {
        "times": found.times,
        "clusters": found.clusters,
        "latents": {
            "values": [each.value for each in found.estimates],
            "standard_errors": [each.error for each in found.estimates],
        },
        "gaussian": found.gaussian,
        "tau": found.tau,
        "num_latents": found.num_latents,
        "dimensions": found.dim,
    }


def _table(told: Difficulty) -> str:
    """A line for each cluster, from the least noisy on."""
    head = ["cluster", "row", "time", "log SNR"]
    for each in _measures(told):
        head += [f"steps to {SHARE:.0%} of the fall of the {each.label}"]
        head += [f"fall of the {each.label}"] if each is told.score else []
    head += [f"final {told.score.label} minus {told.fixed}"] if told.score and told.fixed else []
    head += ["relative entropy at its middle, nats"] if told.entropies else []
    return markdown_table([head, *(_line(told, cluster) for cluster in told.clusters)], words=2)


def _line(told: Difficulty, cluster: Cluster) -> list[str]:
    number, levels = cluster.number, (f"{level:.2f}".replace("-", MINUS) for level in cluster.levels)
    cells = [str(number), cluster.row, "{:.3f} to {:.3f}".format(*cluster.times), " to ".join(levels)]
    for each in _measures(told):
        cells.append(_cell(over_seeds(each.steps(number)), lambda value, _: f"{value:,.0f}"))
        if each is told.score:
            cells.append(_score_cell(over_seeds(each.falls(number)), each.name))
    if told.score and told.fixed:
        cells.append(_score_cell(told.gaps.get(number), told.score.name))
    if told.entropies:
        at = told.entropies.middles.get(number)
        cells.append(DASH if at is None else f"{told.entropies.estimates[at].value:.2e}".replace("-", MINUS))
    return cells


def _score_cell(found: tuple[Estimate, int] | None, name: str) -> str:
    return _cell(found, lambda value, like: written(name, value, like=like))


def _cell(found: tuple[Estimate, int] | None, shown: Any) -> str:
    """`120 (110 to 130) n=3`: mean, interval and number of seeds."""
    if found is None:
        return DASH
    (value, interval), n = found
    text = shown(value, value).replace("-", MINUS)
    if interval:
        text += f" ({' to '.join(shown(bound, value).replace('-', MINUS) for bound in interval)})"
    return f"{text} n={n}"


def _told_convergence(told: Difficulty) -> str:
    seeds = {seed for lines in told.loss.lines.values() for seed in lines}
    parts = [
        "Each row trains on the levels of one cluster alone, 1 the least noisy. Its curve is normalised to its own"
        f" first and last value; converged is the first step, by interpolation, at which {SHARE:.0%} of that fall are"
        " done. What came before the first value is not seen, and of a curve which hardly falls the steps say little."
    ]
    if told.loss.name == HELD_OUT:
        parts.append("The held-out loss is that of the averaged weights, which follow the trained ones.")
    if told.score is not None:
        fixed = f"the model of `{told.fixed}`" if told.fixed else "another model"
        parts.append(f"The {told.score.label} is that of samples for which snapshots of the copy serve its own levels"
                     f" inside {fixed}, which stays fixed.")  # fmt: skip
    few = len(told.clusters) <= MOST_EXACT
    parts.append(
        "The order is tested by Kendall's tau between a cluster's number and its steps, mean over seeds, against"
        f" {'all' if few else f'{RANDOM_ORDERS:,} random'} renumberings of the clusters, alike for all seeds."
    )
    parts.append("Intervals are 95 % by Student's t over seeds." if len(seeds) > 1 else "One seed, hence no intervals.")
    return " ".join(parts)


def _told_entropies(told: Difficulty) -> str:
    found = told.entropies
    if found is None:
        return ""
    return (
        f"The relative entropy is that of q(x_t) and q(x_{{t-1}}) in nats, t and t-1 neighbours among even times of the"
        f" schedule, in the coordinates of the path. It is estimated for the mixture that {found.num_latents:,} latents"
        f" of {found.dim:,} dimensions make: as long as the noise does not join them, that is the entropy of points."
        " The closed form beside it is that of a Gaussian with their mean and covariance. Neighbouring levels count as"
        f" different from {ERRORS:g} standard errors on."
    )


def _measures(told: Difficulty) -> list[Convergence]:
    return [told.loss, *([told.score] if told.score else [])]


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", MINUS)
