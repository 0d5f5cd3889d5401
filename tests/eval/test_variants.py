"""Variants of sampling: what each changes, and that a mistake in one is named before anything is drawn."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import load_model, save_model
from engine.config import TrainConfig
from engine.snapshots import write_snapshot
from eval.config import EvalConfig
from eval.variants import check_samplings, drawn_from, samplings, snapshot_samplings
from generator.config import AutoregressiveConfig, CurriculumConfig, DiffusionConfig, DiffusionSampleConfig

sys.path.insert(0, str(Path(__file__).parent))
import untrained

FAMILIES = {
    "autoregressive": AutoregressiveConfig(),
    "diffusion": DiffusionConfig(sample=DiffusionSampleConfig(num_steps=7), train=TrainConfig(steps=30)),
}


def test_a_variant_changes_what_it_names_and_nothing_else() -> None:
    config = EvalConfig(variants={"cfg2.5": {"diffusion.sample.guidance": 2.5, "diffusion.sample.solver": "heun"}})
    plain, other, variant = samplings(config, FAMILIES)
    assert (plain.subject, other.subject) == ("autoregressive", "diffusion")
    assert (variant.subject, variant.family) == ("diffusion@cfg2.5", "diffusion")
    assert variant.config.sample == DiffusionSampleConfig(num_steps=7, guidance=2.5, solver="heun")
    assert variant.config.train == other.config.train and other.config is FAMILIES["diffusion"]


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"accept0.5": {"diffusion.sample.eta": 1}}, r"variants\.accept0\.5: .* neither with accept nor with step"),
        ({"step9": {"diffusion.sample.eta": 1}}, r"neither with accept nor with step"),
        ({"../up": {"diffusion.sample.eta": 1}}, r"cannot name samples"),
        ({"a": {"diffusion.train.steps": 1}}, r"variants\.a takes keys such as .* but 'diffusion\.train\.steps' is no"),
        ({"a": {"diffusion.sample.eta": 1, "autoregressive.sample.top_k": 1}}, r"it has keys of 2 families"),
        ({"a": {}}, r"it has keys of 0 families"),
        ({"a": {"diffusion.sample.et": 1}}, r"'diffusion\.sample\.et' in eval\.variants\.a: did you mean 'diffusion\."),
        ({"a": {"diffusion.sample.guidance": "two"}}, r"eval\.variants\.a: .*guidance.*two"),
        ({"a": {"diffusion.sample.eta": 2}}, r"eval\.variants\.a: .*eta=2.* must lie in \[0, 1\]"),
    ],
)
def test_a_mistake_in_a_variant_is_named(variants: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        samplings(EvalConfig(variants=variants), FAMILIES)


def test_a_variant_of_a_family_that_is_not_there_is_refused() -> None:
    config = EvalConfig(variants={"cold": {"autoregressive.sample.temperature": 0.5}})
    with pytest.raises(ValueError, match=r"eval\.variants\.cold is about autoregressive"):
        samplings(config, {"diffusion": FAMILIES["diffusion"]})


def test_every_snapshot_is_a_sampling_but_that_which_is_the_model(tmp_path: Path) -> None:
    for step in (20, 10, 30):
        folder = tmp_path / "diffusion" / "snapshots"
        write_snapshot(folder, step, updates=step, model={"a": torch.zeros(1)}, widths={})
    found = list(snapshot_samplings(tmp_path, FAMILIES))
    assert [each.subject for each in found] == ["diffusion@step10", "diffusion@step20"]
    assert [each.config.sample.snapshot for each in found] == [10, 20]


KEPT = TrainConfig(steps=30, snapshot_every=12, ema_widths=(0.1,))


@pytest.mark.parametrize(
    ("sample", "train"),
    [
        ({"guidance": 1.5}, TrainConfig()),
        ({"snapshot": 24}, KEPT),
        ({"snapshot": 30}, KEPT),
        ({"snapshot": 5}, TrainConfig(steps=30)),  # it is there
        ({"guide": "step-12", "guidance": 2}, KEPT),
        ({"ema_width": 0.08}, KEPT),
    ],
)
def test_what_training_will_leave_can_be_sampled(tmp_path: Path, sample: dict[str, Any], train: TrainConfig) -> None:
    write_snapshot(tmp_path / "diffusion" / "snapshots", 5, updates=5, model={"a": torch.zeros(1)}, widths={})
    family = DiffusionConfig(train=train, sample=DiffusionSampleConfig(**sample))
    check_samplings(EvalConfig(snapshots=True), {"diffusion": family}, classes=10, run=tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guidance": 2}, r"samples of diffusion@a: diffusion\.sample\.guidance=2.* diffusion\.model\.label_"),
        ({"snapshot": 13}, r"diffusion@a: diffusion\.sample\.snapshot=13, but .* diffusion\.train\.snapshot_every=12"),
        ({"snapshot": 36}, r"no snapshot of step 36, nor will"),
        ({"guide": "step-13", "guidance": 2}, r"diffusion\.sample\.guide=step-13, but there is no snapshot of step 13"),
        ({"guide": "runs/weak", "guidance": 2}, r"diffusion@a: diffusion\.sample\.guide='runs/weak': .*is missing"),
        ({"ema_width": 0.08}, r"diffusion\.sample\.ema_width=0\.08 .*training keeps with diffusion\.train\.ema_widths"),
    ],
)
def test_what_it_will_not_leave_is_named_before_it(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    config = EvalConfig(variants={"a": {f"diffusion.sample.{key}": value for key, value in values.items()}})
    family = DiffusionConfig(train=TrainConfig(steps=30, snapshot_every=12))
    with pytest.raises(ValueError, match=message):
        check_samplings(config, {"diffusion": family}, classes=0, run=tmp_path)


def test_snapshots_that_nobody_takes_are_not_scored(tmp_path: Path) -> None:
    for families in (FAMILIES, {"autoregressive": FAMILIES["autoregressive"]}):
        with pytest.raises(ValueError, match=r"eval\.snapshots=true, but .* set diffusion\.train\.snapshot_every"):
            check_samplings(EvalConfig(snapshots=True), families, classes=10, run=tmp_path)


SINGLE = CurriculumConfig(kind="single", num_clusters=4, cluster=2)


def inside(outside: Path) -> DiffusionConfig:
    """A model of one cluster of noise levels, which samples inside the one in this folder."""
    sample = dataclasses.replace(untrained.FAMILIES["diffusion"].sample, num_steps=4, outside=str(outside))
    return dataclasses.replace(untrained.FAMILIES["diffusion"], curriculum=SINGLE, sample=sample)


def test_a_missing_model_for_the_other_noise_levels_is_named_before_training(tmp_path: Path) -> None:
    for folder, message in (("nowhere", "is missing"), ("copy", "was itself trained on one cluster")):
        if folder == "copy":
            run = untrained.make_run(tmp_path / "copy")
            card, weights = load_model(run.folder / "diffusion")
            curriculum = dataclasses.asdict(SINGLE)
            save_model(
                run.folder / "diffusion", weights, {**card, "config": {**card["config"], "curriculum": curriculum}}
            )
            folder = str(run.folder)
        families = {"diffusion": inside(Path(folder))}
        with pytest.raises(ValueError, match=rf"samples of diffusion: diffusion\.sample\.outside=.*{message}"):
            check_samplings(EvalConfig(), families, classes=10, run=tmp_path)


def test_snapshots_of_one_cluster_are_scored_inside_the_same_trained_model(tmp_path: Path) -> None:
    run = untrained.make_run(tmp_path)
    card, weights = load_model(run.folder / "diffusion")
    full, folder = tmp_path / "full", run.folder / "diffusion"
    around = save_model(full, {name: 2 * value for name, value in weights.items()}, card)
    curriculum = dataclasses.asdict(SINGLE)
    save_model(folder, weights, {**card, "config": {**card["config"], "curriculum": curriculum}})
    for step in (10, 20):
        model = {name: step / 30 * value for name, value in weights.items()}
        write_snapshot(folder / "snapshots", step, updates=step, model=model, widths={})
    config, family = dataclasses.replace(untrained.EVAL, features=("random",), snapshots=True), inside(full)
    check_samplings(config, {"diffusion": family}, classes=10, run=run.folder)
    found = untrained.scores(run, "fid", config, diffusion=family, autoregressive=None)
    told = {
        subject: entry["protocol"]["subject"]
        for (subject, name), entry in found.items()
        if name == "fd_random" and subject != "real"
    }
    assert {subject: each["outside"] for subject, each in told.items()} == dict.fromkeys(
        ("diffusion", "diffusion@step10", "diffusion@step20"), around
    )
    assert len({each["generator"] for each in told.values()}) == 3
    assert drawn_from(run.folder, family) == [told["diffusion"]["generator"], around]
