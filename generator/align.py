"""Align Your Steps: where a solver best stops on its way, optimised for a trained network (Sabour et al., 2024).

Ten steps are optimised first, by descent of the bound KLUB, which ends early: its optimum is not that of the samples
(appendix A.3), and the descent goes on past the schedules that sample best. Then each step is halved, and only the new
levels are optimised, to the end. What is found is `steps.json` in the folder of the model; `steps-draft.json`, written
after each sweep, is what the same command goes on from.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.checkpoint import write_json
from engine.config import RunConfig, to_dict
from engine.device import Device
from engine.log import progress
from engine.shards import Shards
from generator.align_config import AlignConfig, check_align
from generator.align_measures import Bound, Judge, Probe
from generator.aligned_steps import FILE, read_told
from generator.config import DiffusionConfig, DiffusionSampleConfig
from generator.consistency import objective_config
from generator.descent import Cost, halved, sweep, total
from generator.diffusion import Diffusion
from generator.snapshots import load_generator, which_weights
from generator.steps import solver_levels
from tokenizer.encode import open_codes
from tokenizer.model import load_tokenizer

DRAFT = "steps-draft.json"
LEAST_FALL = 1e-3  # share by which a sweep must lower the bound for another one to follow
# Settings of sampling that an optimised schedule depends on.
DECIDING = ("solver", "eta", "guidance", "guidance_first", "guidance_last", "guidance_rescale", "precision")


@dataclass(kw_only=True)
class Stage:
    """The descent of a schedule, from before the first sweep on."""

    stops: list[float]
    """Where it stands: log SNRs of the levels and of the end of the last step."""
    bounds: list[float]
    """KLUB in nats before the first sweep and after each; never rising."""
    distances: list[float] = field(default_factory=list)
    """Distances of samples likewise, where they are probed."""
    best: int = 0
    """Sweeps after which the schedule was that which is kept."""
    kept: list[float]
    """The stops that are kept."""
    finished: bool = False

    @property
    def num_steps(self) -> int:
        return len(self.stops) - 1

    @property
    def sweeps(self) -> int:
        return len(self.bounds) - 1


def align_steps(*, run: RunConfig, config: DiffusionConfig, device: Device, judge: Callable[[], Judge]) -> Path:
    """Optimise the steps for the trained diffusion model of a run, or go on with it; returns steps.json.

    A schedule that was found under the same settings is left alone. Every process of a run must call it.

    Args:
        judge: makes the judge of samples, when it is first needed.

    Raises:
        ValueError: the model, the tokenizer or the codes are missing or do not belong together, the model has no levels
            to optimise, or the settings leave no room.
    """
    align = config.align or AlignConfig()
    config = dataclasses.replace(config, align=align)
    check_align(config)
    generator, shards = _opened(run, config)
    folder = run.folder / "diffusion"
    identity = _identity(run, config, generator, shards, folder)
    if read_told(folder).get("identity") == identity:
        return folder / FILE
    search = Search(generator.to(device.device), config.sample, align, shards, device, seed=run.seed, judge=judge)
    stages = _begun(folder, identity)
    device.barrier()  # before the first process writes, all have read
    for _ in search.go_on(stages):
        if device.is_main:
            write_json(folder / DRAFT, {"identity": identity, "stages": [dataclasses.asdict(each) for each in stages]})
    if device.is_main:
        write_json(folder / FILE, _told(identity, stages, search.judge_name))
        (folder / DRAFT).unlink()
    device.barrier()
    return folder / FILE


class Search:
    """The descent of one schedule after the other, with what it measures."""

    def __init__(
        self, generator: Diffusion, sample: DiffusionSampleConfig, align: AlignConfig, shards: Shards, device: Device,
        *, seed: int, judge: Callable[[], Judge],
    ) -> None:  # fmt: skip
        self.align, self.sample, self.device = align, sample, device
        self.cost: Cost = Bound(
            generator, sample, shards, device, num=align.num_images, seed=seed, sigma_data=align.sigma_data
        )
        self.probe: Probe | None = None
        if align.probe_images:
            self.probe = Probe(generator, sample, shards, device, num=align.probe_images, seed=seed, judge=judge())

    @property
    def judge_name(self) -> str | None:
        return self.probe.judge.name if self.probe else None

    def go_on(self, stages: list[Stage]) -> Iterator[list[Stage]]:
        """Carries the stages on, from where they stand to the end; yields them after each sweep."""
        while True:
            if not stages:
                stages.append(self._begin(start_stops(self.align, self.sample), self.probe))
            elif not stages[-1].finished:
                self._advance(stages[-1], first=len(stages) == 1)
            elif len(stages) <= self.align.subdivisions:
                stages.append(self._begin(halved(stages[-1].kept), None))
            else:
                return
            yield stages

    def _begin(self, stops: list[float], probe: Probe | None) -> Stage:
        distances = [probe(stops)] if probe else []
        return Stage(stops=stops, kept=stops, bounds=[total(stops, self.cost)], distances=distances)

    def _advance(self, stage: Stage, *, first: bool) -> None:
        """One sweep: over all levels but the first of the first schedule, over the new ones of others."""
        free = range(1, stage.num_steps, 1 if first else 2)
        title = f"steps/{stage.num_steps}, sweep {stage.sweeps + 1}"
        with progress(total=len(free), title=title, unit="level", enabled=self.device.is_main) as bar:
            moved = sweep(stage.stops, self.cost, free, candidates=self.align.candidates, each=bar.update)
            self._note(stage, moved, self.probe if first else None)
            told = {"distance": stage.distances[-1]} if stage.distances else {}
            bar.update(0, bound=stage.bounds[-1], **told)

    def _note(self, stage: Stage, moved: list[float], probe: Probe | None) -> None:
        """Keep what a sweep has found, and whether it was the last one."""
        if moved == stage.stops:
            stage.finished = True
            return
        stage.stops = moved
        stage.bounds.append(total(moved, self.cost))
        if probe is not None:
            stage.distances.append(probe(moved))
        if probe is None or stage.distances[-1] < stage.distances[stage.best]:
            stage.best, stage.kept = stage.sweeps, moved
        patient = probe is None or stage.sweeps - stage.best < self.align.patience
        fell = stage.bounds[-1] < stage.bounds[-2] * (1 - LEAST_FALL)
        stage.finished = stage.sweeps >= self.align.max_sweeps or not patient or not fell


def start_stops(align: AlignConfig, sample: DiffusionSampleConfig) -> list[float]:
    """The stops that the descent begins with."""
    first, last = align.ends(sample)
    ended = align.start != "cosine"  # which spaces itself down to clean data
    levels = solver_levels(align.start, align.num_steps + ended, first=first, last=last).tolist()
    return [first, *levels[1 : align.num_steps], last]  # the ends exactly


def _opened(run: RunConfig, config: DiffusionConfig) -> tuple[Diffusion, Shards]:
    """The trained model, with the weights and other networks that it samples with, and its training latents."""
    generator = load_generator(run.folder, "diffusion", **which_weights(dataclasses.asdict(config.sample)))
    assert isinstance(generator, Diffusion)
    kind = objective_config(generator.card["config"]).kind
    if kind != "denoising" or generator.level_maps:
        told = f"diffusion.objective.kind={kind}" if kind != "denoising" else "a schedule for each pixel or channel"
        raise ValueError(f"steps are optimised for a denoiser with one level for all numbers, not for {told}")
    tokenizer = load_tokenizer(run.tokenizer_folder)
    if generator.tokenizer_fingerprint != tokenizer.code_fingerprint:
        raise ValueError(
            f"{run.folder / 'diffusion'} learned from codes {generator.tokenizer_fingerprint}, but the run's tokenizer"
            f" gives {tokenizer.code_fingerprint}: encode and train the generator again"
        )
    return generator, open_codes(run, "train", tokenizer)


def _identity(
    run: RunConfig, config: DiffusionConfig, generator: Diffusion, shards: Shards, folder: Path
) -> dict[str, Any]:
    """All that decides the schedule that is found, JSON-ready."""
    sample, (first, last) = to_dict(config.sample), config.align.ends(config.sample)  # type: ignore[union-attr]
    told = {
        "seed": run.seed,
        "model": json.loads((folder / "model.json").read_text(encoding="utf-8"))["fingerprint"],
        "networks": [generator.fingerprint, *(other.fingerprint for other in generator.companions.values())],
        "codes": shards.identity(),
        "align": {**to_dict(config.align), "first_logsnr": first, "last_logsnr": last},
        "sample": {key: sample[key] for key in DECIDING},
    }
    return json.loads(json.dumps(told))


def _begun(folder: Path, identity: dict[str, Any]) -> list[Stage]:
    """The stages that an interrupted call left, if it was for the same."""
    try:
        told = json.loads((folder / DRAFT).read_text(encoding="utf-8"))
        return [Stage(**each) for each in told["stages"]] if told["identity"] == identity else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _told(identity: dict[str, Any], stages: Sequence[Stage], judge: str | None) -> dict[str, Any]:
    """What steps.json says."""
    return {
        "model": identity["model"],
        "stops": stages[-1].kept,
        "stages": [
            {
                "num_steps": each.num_steps, "stops": each.kept, "sweeps": each.best,
                "bounds": each.bounds, "distances": each.distances,
            }
            for each in stages
        ],
        "distance": judge,
        "identity": identity,
    }  # fmt: skip
