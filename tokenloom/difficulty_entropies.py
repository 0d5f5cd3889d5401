"""The relative entropy of consecutive marginals of the noising, over the noise levels of a study's latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.log import progress
from generator.config import DiffusionConfig
from generator.curriculum import Curriculum
from generator.marginals import Measured, even_times, gaussian_divergence, mixture_divergence, principal
from generator.schedule import build_schedule
from tokenloom.rank_order import kendall_tau
from tokenloom.run_files import RunFiles
from tokenloom.study_plan import Row, Run

LEVELS, FIRST_STEPS = 33, (1, 2, 4, 8, 16)  # where it is looked at, beside the middle of each cluster
LATENTS, DRAWS = 2000, 1000


@dataclass(frozen=True, kw_only=True)
class Entropies:
    """KL(q(x_t) || q(x_{t-1})) at times of the schedule, rising, between T even ones, in nats."""

    times: list[float]
    clusters: list[int]
    estimates: list[Measured]
    """Of the mixture that the latents make."""
    gaussian: list[float]
    """Closed form for a Gaussian with the latents' mean and covariance."""
    middles: dict[int, int]
    """Index of the middle of each cluster."""
    num_latents: int
    dim: int

    @property
    def tau(self) -> float:
        """Kendall's tau between time and the estimate."""
        return kendall_tau([each.value for each in self.estimates])


def entropies_on_disk(copy: Row, done: Sequence[Run]) -> Entropies | None:
    """Of the latents that the runs were trained on; None if there are none on disk."""
    shards = next((found for run in done if (found := RunFiles(run.folder).codes("train"))), None)
    if shards is None:
        return None
    number = min(LATENTS, len(shards))
    batch = shards.load(np.arange(number) * len(shards) // number)
    if "latents" not in batch:
        return None
    assert copy.experiment.diffusion is not None
    return relative_entropies(copy.experiment.diffusion, batch["latents"].flatten(1))


def relative_entropies(config: DiffusionConfig, latents: torch.Tensor, *, draws: int = DRAWS) -> Entropies:
    """Relative entropies of consecutive marginals of latents [M, D] on the path and the schedule of a configuration."""
    curriculum = curriculum_of(config)
    times, levels = even_times(curriculum.schedule)  # [T], falling
    middles = {
        config.curriculum.num_clusters - index: round(float(1 - middle) * (len(times) - 1))
        for index, middle in enumerate((curriculum.edges[:-1] + curriculum.edges[1:]) / 2)
    }
    spread = np.linspace(1, len(times) - 1, LEVELS).round().astype(int).tolist()
    looked = [at for at in sorted({*spread, *FIRST_STEPS, *middles.values()}) if levels[at] < levels[at - 1]]
    index = torch.tensor(looked)
    variances, means = principal(latents)
    gaussian = gaussian_divergence(levels[index], levels[index - 1], variances, means, path=config.path)
    generator, estimates = torch.Generator().manual_seed(0), list[Measured]()
    with progress(total=len(looked), title="relative entropy", unit="level") as bar:
        for at in looked:
            pair = float(levels[at]), float(levels[at - 1])
            estimates.append(mixture_divergence(*pair, latents, path=config.path, draws=draws, generator=generator))
            bar.update(1)
    places = {number: looked.index(at) for number, at in middles.items() if at in looked}
    return Entropies(
        times=times[index].tolist(), clusters=curriculum.cluster_of(levels[index]).tolist(), estimates=estimates,
        gaussian=gaussian.tolist(), middles=places, num_latents=len(latents), dim=latents.shape[1],
    )  # fmt: skip


def curriculum_of(config: DiffusionConfig) -> Curriculum:
    """The clusters of a configuration.

    Raises:
        ValueError: a learned schedule, whose levels no configuration tells.
    """
    if config.schedule.kind == "learned":
        raise ValueError("schedule.kind=learned has no levels before the training: leave study.difficulty out")
    return Curriculum(config.curriculum, build_schedule(config.schedule), steps=config.train.steps)
