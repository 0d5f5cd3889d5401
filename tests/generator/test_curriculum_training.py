"""Staged curricula in training: real losses move them, they resume to the bit, and the log tells what they did."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.batches import StepRandom
from engine.checkpoint import load_checkpoint, load_model
from engine.config import DataConfig, RunConfig, TrainConfig
from engine.device import Device
from engine.log import read_metrics
from engine.loop import _Trainer
from engine.shards import open_shards
from generator.config import CurriculumConfig, DenoiserModelConfig, DiffusionConfig, DiffusionSampleConfig
from generator.diffusion_task import LOGSNR_EDGES, DiffusionTask
from generator.pacing import Pacing
from generator.sample import load_generator
from generator.schedule import MAX_LOGSNR
from generator.train import train_generator
from tokenizer.model import load_tokenizer

STEPS = 24
TRAIN = TrainConfig(
    steps=STEPS, batch_size=8, learning_rate=1e-2, decay="constant", ema=0.9, log_every=1, preview_every=STEPS,
    checkpoint_every=STEPS,
)  # fmt: skip
MODEL = DenoiserModelConfig(depth=1, width=16, heads=2)
CONFIG = DiffusionConfig(model=MODEL, train=TRAIN, sample=DiffusionSampleConfig(num_steps=1, batch_size=24))
PATIENT: dict[str, Any] = {"num_clusters": 4, "patience": 1, "smoothing": 0.5}
EASY = CurriculumConfig(kind="easy_to_hard", **PATIENT)


def train(run: RunConfig, device: Device, name: str = "counting", **changes: Any) -> Path:
    """Train in a copy of the encoded run of that name; keys of TrainConfig change it, others the section."""
    there = run.folder.parent / name
    if not there.exists():
        shutil.copytree(run.folder / "tokenizer", there / "tokenizer")
        shutil.copytree(run.folder / "codes", there / "codes")
    cadence = {key: changes.pop(key) for key in list(changes) if hasattr(TRAIN, key)}
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(TRAIN, **cadence), **{"curriculum": EASY, **changes})
    return train_generator(
        run=dataclasses.replace(run, name=name), data=DataConfig(workers=0), config=config, family="diffusion",
        device=device,
    )  # fmt: skip


def make_task(run: RunConfig, curriculum: CurriculumConfig, steps: int) -> DiffusionTask:
    shards, test_shards = (open_shards(run.folder / "codes" / split) for split in ("train", "test"))
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(TRAIN, steps=steps), curriculum=curriculum)
    return DiffusionTask(
        config=config, shards=shards, test_shards=test_shards, tokenizer=load_tokenizer(run.folder)
    )  # fmt: skip


def lines(folder: Path) -> list[dict[str, Any]]:
    """What was logged of training, without the figures that are times."""
    told = [line for line in read_metrics(folder) if "loss" in line]
    return [{key: value for key, value in line.items() if key != "samples_per_second"} for line in told]


def stages_by(losses: list[float], config: CurriculumConfig) -> list[int]:
    """The stages after each of these losses."""
    pacing, stages = Pacing(config, num_stages=config.num_clusters), []
    for loss in losses:
        pacing.update(loss)
        stages.append(pacing.stage)
    return stages


@pytest.fixture
def part_losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The loss of every part of a batch, in the order of training."""
    seen: list[float] = []
    plain = DiffusionTask.step

    def step(self: DiffusionTask, batch: dict[str, Tensor], rng: StepRandom) -> dict[str, Tensor]:
        figures = plain(self, batch, rng)
        seen.append(figures["loss"].item())
        return figures

    monkeypatch.setattr(DiffusionTask, "step", step)
    return seen


# Stages move by the losses of the training


@pytest.mark.parametrize("kind", ["easy_to_hard", "anti"])
def test_the_log_tells_the_stages_that_the_losses_lead_to(run: RunConfig, device: Device, kind: Any) -> None:
    curriculum = CurriculumConfig(kind=kind, **PATIENT)
    told = lines(train(run, device, curriculum=curriculum))
    stages = [line["curriculum/stage"] for line in told]
    assert stages == stages_by([line["loss"] for line in told], curriculum)
    assert stages[-1] == 4
    # A line tells the range of the next step, and what the steps before it drew.
    for before, line in itertools.pairwise(told):
        low, high = before["curriculum/lowest_logsnr"], before["curriculum/highest_logsnr"]
        shares = line["curriculum/draws"]["shares"]
        assert line["curriculum/draws"]["edges"] == list(LOGSNR_EDGES)
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        for left, share in zip(LOGSNR_EDGES, shares, strict=False):
            assert share == 0 or (left + 1 > low and left < high)
        stage = before["curriculum/stage"]
        active = range(5 - stage, 5) if kind == "easy_to_hard" else range(1, stage + 1)
        drawn = {int(key[-2:]) for key in line if key.startswith("loss_cluster/")}
        assert drawn <= set(active)
    ranges = {
        line["curriculum/stage"]: [line[f"curriculum/{end}_logsnr"] for end in ("lowest", "highest")] for line in told
    }
    half = [-MAX_LOGSNR, 0] if kind == "easy_to_hard" else [0, MAX_LOGSNR]  # of all draws, with the cosine schedule
    assert ranges[2] == pytest.approx(half, abs=1e-4)
    assert ranges[4] == pytest.approx([-MAX_LOGSNR, MAX_LOGSNR])


def test_validation_tells_of_every_cluster_in_the_first_stage_too(run: RunConfig) -> None:
    with torch.no_grad():
        figures = make_task(run, EASY, steps=STEPS).validate()
    by_cluster = [figures[f"loss_cluster/0{number}"] for number in (1, 2, 3, 4)]
    assert sum(by_cluster) / 4 == pytest.approx(figures["loss"])  # 6 of 24 latents each


def test_the_mean_over_the_parts_moves_the_stages_not_one_part(
    run: RunConfig, device: Device, part_losses: list[float]
) -> None:
    whole = train(run, device, "whole", learning_rate=1e-3)  # larger steps of Adam would show rounding
    part_losses.clear()
    parts = train(run, device, "parts", learning_rate=1e-3, accumulate=2)
    stages = [line["curriculum/stage"] for line in lines(parts)]
    assert stages[-1] == 4
    assert stages == [line["curriculum/stage"] for line in lines(whole)]
    for part in (0, 1):
        assert stages != stages_by(part_losses[part::2], EASY)
    first, second = (load_model(folder)[1] for folder in (whole, parts))
    assert all(torch.allclose(first[key], second[key], atol=1e-4) for key in first)


def test_tensorboard_shows_the_stage_and_what_is_drawn(run: RunConfig, device: Device) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fixed = CurriculumConfig(kind="easy_to_hard", num_clusters=2, pacing="fixed", stage_steps=2)
    run = dataclasses.replace(run, tensorboard=True)
    folder = train(run, device, steps=4, preview_every=4, curriculum=fixed)
    events = reader.EventAccumulator(str(folder / "tensorboard"), {"histograms": 0})  # all of them
    events.Reload()
    stages = [(event.step, event.value) for event in events.Scalars("curriculum/stage")]
    assert stages == [(1, 1), (2, 2), (3, 2), (4, 2)]
    told = {key: [event.value for event in events.Scalars(key)] for key in events.Tags()["scalars"]}
    assert told["curriculum/lowest_logsnr"] == pytest.approx([-MAX_LOGSNR] * 4)
    assert told["curriculum/highest_logsnr"] == pytest.approx([0, *[MAX_LOGSNR] * 3], abs=1e-4)
    assert [len(told[f"loss_cluster/0{number}"]) for number in (1, 2)] == [2, 4]
    assert [len(told[f"validation/loss_cluster/0{number}"]) for number in (1, 2)] == [1, 1]
    first, *_, second = (event.histogram_value for event in events.Histograms("curriculum/draws"))
    assert list(LOGSNR_EDGES[1:]) == first.bucket_limit == second.bucket_limit
    above = LOGSNR_EDGES.index(0)  # the first bin above log SNR 0, where the first stage ends
    assert sum(first.bucket[above:]) == 0 < sum(second.bucket[above:])


def test_one_cluster_trains_to_the_weights_of_no_curriculum(run: RunConfig, device: Device) -> None:
    one = CurriculumConfig(kind="easy_to_hard", num_clusters=1)
    folders = [
        train(run, device, name, steps=6, curriculum=each) for name, each in (("no", CurriculumConfig()), ("one", one))
    ]
    plain, staged = (load_model(folder)[1] for folder in folders)
    assert all(torch.equal(plain[key], staged[key]) for key in plain)


def test_skipped_steps_do_not_count(run: RunConfig, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = DiffusionTask.step

    def step(self: DiffusionTask, batch: dict[str, Tensor], rng: StepRandom) -> dict[str, Tensor]:
        figures = plain(self, batch, rng)
        return {**figures, "loss": figures["loss"] * (torch.nan if rng.step in (1, 4, 5) else 1.0)}

    monkeypatch.setattr(DiffusionTask, "step", step)
    fixed = CurriculumConfig(kind="easy_to_hard", num_clusters=4, pacing="fixed", stage_steps=2)
    folder = train(run, device, steps=10, curriculum=fixed)
    told = {line["step"]: line.get("curriculum/stage") for line in read_metrics(folder) if "skipped_steps" in line}
    good = {step: stage for step, stage in told.items() if stage is not None}
    assert good == {1: 1, 3: 2, 4: 2, 7: 3, 8: 3, 9: 4, 10: 4}


# Resuming


def same(one: Any, other: Any) -> bool:
    """Equality to the bit of nested tables of tensors and numbers."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"curriculum": CurriculumConfig(kind="anti", **{**PATIENT, "smoothing": 0.0}), "target": "eps"},
        {"curriculum": CurriculumConfig(kind="easy_to_hard", num_clusters=4, pacing="fixed", stage_steps=4)},
        {"curriculum": dataclasses.replace(EASY, stage_steps=6), "weight": "learned", "accumulate": 2},
        {"model": dataclasses.replace(MODEL, label_dropout=1.0), "weight": "min_snr"},
    ],
    ids=["easy to hard", "anti, raw loss", "fixed", "learned weight", "unconditional"],
)
def test_killed_within_a_stage_and_resumed_equals_uninterrupted(
    run: RunConfig, device: Device, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """After two stages, in the middle of the third, between two lines of the log."""
    changes = {"log_every": 3, **changes}
    stages: list[int] = []
    after_step = DiffusionTask.after_step

    def recorded(self: DiffusionTask, *arguments: Any) -> None:
        after_step(self, *arguments)
        stages.append(self.curriculum.stage)

    monkeypatch.setattr(DiffusionTask, "after_step", recorded)
    whole = train(run, device, "whole", **changes)
    monkeypatch.undo()
    moment = next(step for step in range(1, STEPS) if stages[step - 2 : step] == [3, 3] and step % 3)

    class Killed(_Trainer):
        def _one_step(self, stream: Iterator[dict[str, Tensor]]) -> None:
            if self.step == moment:
                raise KeyboardInterrupt
            super()._one_step(stream)

    monkeypatch.setattr("engine.loop._Trainer", Killed)
    with pytest.raises(KeyboardInterrupt):
        train(run, device, "killed", checkpoint_every=moment, **changes)
    monkeypatch.undo()
    killed = run.folder.parent / "killed" / "diffusion"
    saved = load_checkpoint(killed / "checkpoints")
    assert saved is not None and saved[2]["step"] == moment
    kept = saved[2]["task"]["curriculum"]
    assert kept["stage"] == 3 and kept["steps"] > 0
    assert train(run, device, "killed", **changes) == killed
    assert lines(killed) == lines(whole)
    ends = [load_checkpoint(folder / "checkpoints") for folder in (whole, killed)]
    assert same(*ends)
    assert load_generator(killed, "diffusion").sample(None, [0], num_steps=1).isfinite().all()


def test_a_training_that_ended_within_a_stage_goes_on_there_when_steps_are_raised(
    run: RunConfig, device: Device
) -> None:
    """As the longer training does."""
    whole = train(run, device, "whole", checkpoint_every=1)
    stages = [line["curriculum/stage"] for line in lines(whole)]
    end = next(step for step in range(EASY.least_steps + 1, STEPS) if stages[step - 2] == stages[step - 1] < 4)
    with pytest.warns(UserWarning, match=f"the training ended in stage {stages[end - 1]} of 4"):
        raised = train(run, device, "raised", steps=end, preview_every=end)
    assert load_model(raised)[0]["train"]["steps"] == end
    assert train(run, device, "raised") == raised
    assert lines(raised) == lines(whole)
    ends = [load_checkpoint(folder / "checkpoints") for folder in (whole, raised)]
    assert same(*ends)


def test_another_curriculum_does_not_resume(run: RunConfig, device: Device) -> None:
    fixed = CurriculumConfig(kind="easy_to_hard", num_clusters=4, pacing="fixed", stage_steps=2)
    train(run, device, steps=7, preview_every=0, curriculum=fixed)
    for changed, told in (
        (dataclasses.replace(fixed, stage_steps=1), r"diffusion\.curriculum\.stage_steps: 2 -> 1"),
        (dataclasses.replace(fixed, kind="anti"), r"diffusion\.curriculum\.kind: 'easy_to_hard' -> 'anti'"),
        (CurriculumConfig(num_clusters=4), r"diffusion\.curriculum\.kind: 'easy_to_hard' -> 'uniform'"),
    ):
        with pytest.raises(ValueError, match=rf"(?s)begun with another configuration.*{told}"):
            train(run, device, steps=7, preview_every=0, curriculum=changed)


# The end


# With no patience and no smoothing each loss above the one before begins a stage; the first of a stage never does.
UNFINISHED = {
    "easy to hard": ("easy_to_hard", [1, 2, 1, 0, -1, -2, -3, -4], r"stage 2 of 4 .* above 0\.0 .*1 \.\. 2"),
    "anti": ("anti", [1, 2, 1, 0, -1, -2, -3, -4], r"stage 2 of 4 .* below 0\.0 .*3 \.\. 4"),
    "begins after the last step": ("easy_to_hard", [1, 2, 1, 2, 1, 0, -1, 2], r"stage 3 of 4 .* above 1\.8 .*1 \.\. 1"),
}


@pytest.mark.parametrize(("kind", "losses", "named"), UNFINISHED.values(), ids=UNFINISHED)
def test_a_training_that_ends_before_its_last_stage_says_what_it_never_saw(
    run: RunConfig, kind: Any, losses: list[float], named: str
) -> None:
    task = make_task(run, CurriculumConfig(kind=kind, num_clusters=4, patience=0, smoothing=0.0), steps=8)
    for step, loss in enumerate(losses[:-1]):
        task.after_step(step, {"loss": loss}, StepRandom(0, step, 8))
    with pytest.warns(UserWarning, match=named):
        task.after_step(7, {"loss": losses[-1]}, StepRandom(0, 7, 8))


def test_a_last_stage_of_one_step_is_enough(run: RunConfig, device: Device) -> None:
    fixed = CurriculumConfig(kind="easy_to_hard", num_clusters=4, pacing="fixed", stage_steps=2)
    told = lines(train(run, device, steps=7, curriculum=fixed))
    assert [line["curriculum/stage"] for line in told] == [1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("kind", ["uniform", "asymmetric", "progressive", "single"])
def test_curricula_without_stages_are_told_of_as_one(run: RunConfig, device: Device, kind: Any) -> None:
    (told,) = lines(train(run, device, steps=2, log_every=2, curriculum=CurriculumConfig(kind=kind)))
    assert told["curriculum/stage"] == 1
    assert told["curriculum/lowest_logsnr"] < told["curriculum/highest_logsnr"]
    drawn = [key for key in told if key.startswith("loss_cluster/")]
    assert drawn and (kind != "single" or drawn == ["loss_cluster/01"])
