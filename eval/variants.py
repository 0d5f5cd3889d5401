"""Which samples are scored: those of each generator, others drawn in other ways, those of snapshots of its training."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from engine.config import TrainConfig, changed
from engine.snapshots import snapshots
from eval.config import EvalConfig
from generator.aligned_steps import check_coming
from generator.condition import check_guidance
from generator.config import AutoregressiveConfig, DiffusionConfig
from generator.sample import open_generator
from generator.snapshots import load_generator, load_outside, which_weights

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


def drawn_from(run: Path, config: GeneratorConfig) -> list[str]:
    """Fingerprints of the network that samples, with just the weights that the configuration names, and of those
    that it samples with.

    Raises:
        ValueError: as `open_generator`.
    """
    generator = open_generator(run, config)
    companions = getattr(generator, "companions", {})
    return [generator.fingerprint, *(other.fingerprint for other in companions.values())]


def names_weights(config: GeneratorConfig) -> bool:
    """Whether a sample section names a snapshot, an average or another network."""
    return any(value is not None for value in which_weights(dataclasses.asdict(config.sample)).values())


def check_samplings(config: EvalConfig, families: Mapping[str, GeneratorConfig], *, classes: int, run: Path) -> None:
    """Raise now the ValueError that sampling would raise after the training of a run with so many classes of images:
    nothing to guide by, or weights that will not be kept."""
    for subject, family, section in samplings(config, families):
        dropout = section.model.label_dropout
        try:
            if getattr(section.sample, "guide", None) is None:  # another network that guides needs no null label
                guidable = dropout != 1 and (classes > 0 or section.condition.kind != "class")
                check_guidance(family, section.sample.guidance, guidable=guidable, label_dropout=dropout)
            if isinstance(section, DiffusionConfig):
                _check_weights(section, run / family)
        except ValueError as error:
            raise ValueError(f"samples of {subject}: {error}") from error
    diffusion = families.get("diffusion")
    if config.snapshots and not (diffusion and (diffusion.train.snapshot_every or snapshots(run / "diffusion"))):
        raise ValueError(
            "eval.snapshots=true, but no snapshots are taken: set diffusion.train.snapshot_every, or leave it out"
        )


def _check_weights(config: DiffusionConfig, stage: Path) -> None:
    """Raise ValueError if this stage will lack such a snapshot, average or steps, or there is no such other network."""
    check_coming(config, stage)
    sample, train, guide = config.sample, config.train, config.sample.guide
    step = re.fullmatch(r"step-(\d+)", guide or "")
    for key, wanted in (("snapshot", sample.snapshot), ("guide", int(step[1]) if step else None)):
        if wanted is not None and not _is_kept(train, wanted) and wanted not in snapshots(stage):
            raise ValueError(
                f"diffusion.sample.{key}={getattr(sample, key)}, but there is no snapshot of step {wanted}, nor will"
                f" there be with diffusion.train.snapshot_every={train.snapshot_every}, steps={train.steps}"
            )
    if sample.ema_width is not None and not train.ema_widths:
        raise ValueError(
            f"diffusion.sample.ema_width={sample.ema_width} is made of averages that training keeps with"
            " diffusion.train.ema_widths alone: set it, to [0.05,0.1] for instance, and snapshot_every"
        )
    if guide is not None and not step:
        try:
            load_generator(guide, "diffusion")
        except ValueError as error:
            raise ValueError(f"diffusion.sample.guide={guide!r}: {error}") from error
    if sample.outside is not None:
        load_outside(sample.outside)


def _is_kept(train: TrainConfig, step: int) -> bool:
    """Whether the training keeps a snapshot of a step."""
    every = train.snapshot_every
    return every > 0 and (step == train.steps or (0 < step < train.steps and step % every == 0))


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
