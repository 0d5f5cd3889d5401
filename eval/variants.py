"""Which samples are scored: those of each generator, others drawn in other ways, those of snapshots of its training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from engine.config import changed
from engine.snapshots import snapshots
from eval.config import EvalConfig
from generator.config import AutoregressiveConfig, DiffusionConfig

GeneratorConfig = AutoregressiveConfig | DiffusionConfig


class Sampling(NamedTuple):
    """A way to draw samples, under the name that their scores bear."""

    subject: str
    family: str
    config: GeneratorConfig


@dataclass(frozen=True, kw_only=True)
class Families:
    """The sections that a variant may change."""

    autoregressive: AutoregressiveConfig | None = None
    diffusion: DiffusionConfig | None = None


def samplings(config: EvalConfig, families: Mapping[str, GeneratorConfig]) -> list[Sampling]:
    """Each family as its section says, then each variant of eval.variants.

    Raises:
        ValueError: a variant of a family that is not there, an unknown key, or a value that does not fit.
    """
    found = [Sampling(family, family, section) for family, section in families.items()]
    for name, values in config.variants.items():
        family, where = next(iter(values)).split(".")[0], f"eval.variants.{name}"
        if family not in families:
            raise ValueError(f"{where} is about {family}, which this configuration has not: leave the variant out")
        section = getattr(changed(Families(**{family: families[family]}), values, where), family)  # type: ignore[arg-type]
        found.append(Sampling(f"{family}@{name}", family, section))
    return found


def snapshot_samplings(run: Path, families: Mapping[str, GeneratorConfig]) -> Iterator[Sampling]:
    """The snapshots that lie in a run folder, as `<family>@step<k>`.

    One that sampling takes anyway, that of the last step, is left out: its scores are those of the family itself.
    """
    for family, config in families.items():
        if not isinstance(config, DiffusionConfig):
            continue
        for step in snapshots(run / family):
            if step != config.train.steps or config.sample.snapshot is not None:
                sample = dataclasses.replace(config.sample, snapshot=step)
                yield Sampling(f"{family}@step{step}", family, dataclasses.replace(config, sample=sample))
