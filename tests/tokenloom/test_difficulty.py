"""Which noise levels are hard: the measures of pretended runs, by hand, and a small real study."""

import contextlib
import dataclasses
import io
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from engine.config import RunConfig
from engine.shards import ShardWriter
from generator.config import CurriculumConfig, DiffusionConfig, DiffusionSampleConfig, ScheduleConfig
from generator.marginals import Measured
from tokenloom import study_jobs
from tokenloom.cli import main
from tokenloom.difficulty import check_difficulty, difficulty_markdown, told_order, told_shape, write_difficulty
from tokenloom.difficulty_entropies import Entropies, relative_entropies
from tokenloom.difficulty_measures import Cluster, Convergence, Difficulty, normalised, smoothed, steps_to_fall
from tokenloom.experiment import Experiment
from tokenloom.rank_order import rank_order
from tokenloom.study import tell
from tokenloom.study_config import CurveConfig, StudyConfig, load_study
from tokenloom.study_plan import Row, Run, plan_rows, plan_runs

CONFIG = Path(__file__).parents[2] / "configs" / "study-difficulty.yaml"
COPY = {
    "diffusion.curriculum.kind": "single", "diffusion.curriculum.num_clusters": 5,
    "diffusion.sample.outside": "row:full",
}  # fmt: skip
ROWS: dict[str, Any] = {
    "full": {}, **{f"part-{number}": {**COPY, "diffusion.curriculum.cluster": number} for number in range(1, 6)}
}  # fmt: skip
CONTENT: dict[str, Any] = {
    "study": {
        "title": "Small", "stages": "generator", "seeds": [0, 1], "budget": "steps", "difficulty": True, "rows": ROWS,
        "metrics": [{"name": "fd", "subject": "diffusion", "better": "lower"}],
        "curve": {"stage": "diffusion", "score": "fd"},
    },
    "data": {"source": "digits", "size": 16},
    "tokenizer": {"model": {"architecture": "pixels"}},
    "diffusion": {
        "model": {"depth": 1, "width": 16, "heads": 2, "patch_size": 4}, "schedule": {"kind": "ddpm"}, "target": "eps",
        "train": {"steps": 100, "snapshot_every": 25, "preview_every": 10},
    },
    "eval": {"features": ["random"], "snapshots": True},
}  # fmt: skip
# By cluster. The held-out loss falls from 1 to 0 between step 10 and this one (and by 0.1 more in the next seed).
LAST_OF_LOSS = {1: 90, 2: 70, 3: 50, 4: 30, 5: 20}
# fd at the snapshots after 25, 50 and 75 of 100 steps and at the end; cluster 3 does not fall.
SCORES = {1: [9, 7, 5, 4], 2: [8, 4, 4, 4], 3: [5, 5, 5, 6], 4: [9, 8, 4, 4], 5: [6, 5, 5, 5]}


def loaded(folder: Path, **changes: Any) -> tuple[StudyConfig, Experiment]:
    content = {**CONTENT, "study": {**CONTENT["study"], **changes}}
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return load_study(["--config", str(folder / "study.yaml"), f"--run.root={folder / 'runs'}", "--run.name=s"])


class Plan(NamedTuple):
    """The study with its rows, in a folder of its own."""

    study: StudyConfig
    rows: list[Row]
    base: RunConfig

    @property
    def runs(self) -> list[Run]:
        """All runs, the model first that others take."""
        return plan_runs(self.study, self.rows, self.study.seeds, self.base)

    def changed(self, **changes: Any) -> "Plan":
        return self._replace(study=dataclasses.replace(self.study, **changes))

    def write(self) -> dict[str, Any]:
        path = write_difficulty(self.study, self.rows, self.runs, {}, self.base.folder)
        assert path == self.base.folder / "difficulty.md"
        told: dict[str, Any] = json.loads((self.base.folder / "difficulty.json").read_text())
        return told


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    study, base = loaded(tmp_path_factory.mktemp("planned"))
    return Plan(study, plan_rows(study, base), base.run)


@pytest.fixture
def plan(planned: Plan, tmp_path: Path) -> Plan:
    return planned._replace(base=dataclasses.replace(planned.base, root=str(tmp_path), name="study"))


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def pretend(run: Run, *, held_out: bool = True) -> None:
    """Leave what a run would leave that has ended."""
    number = int(run.row[-1]) if run.row != "full" else 0
    lines: list[dict[str, Any]] = []
    if number:
        key = f"validation/loss_cluster/{number:02d}" if held_out else "loss"
        ends = {10: 1.0, LAST_OF_LOSS[number]: 0.0, 100: -0.1 * run.seed}
        lines = [{"step": step, key: value} for step, value in ends.items()]
        lines += [{"step": step, "learning_rate": 1.0} for step in (10, 20)]
    scores = SCORES.get(number, [9, 7, 6, 5 + run.seed])
    subjects = ["diffusion@step25", "diffusion@step50", "diffusion@step75", "diffusion"]
    records = [
        {"name": "fd_random", "subject": subject, "value": value, "interval": None, "n": 20, "protocol": {}}
        for subject, value in zip(subjects, scores, strict=True)
    ]
    write(run.folder / "diffusion" / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write(run.folder / "diffusion" / "model.json", json.dumps({"fingerprint": run.name}))
    write(run.folder / "eval" / "metrics.json", json.dumps(records))
    write(run.folder / "config.yaml", yaml.safe_dump({"run": {"tokenizer": run.experiment.run.tokenizer}}))
    write(run.folder / "study.json", json.dumps({"settings": run.settings, "seconds": 1.0}))


def encode(folder: Path, num: int = 40) -> None:
    meta = dict.fromkeys(("tokenizer_fingerprint", "grid", "vocab_size", "class_names", "images"))
    with ShardWriter(folder / "codes" / "train", views=["original"]) as writer:
        latents = torch.randn(num, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
        writer.append(labels=torch.zeros(num, dtype=torch.int64), latents=latents)
        writer.close({**meta, "latent_shape": [2, 2, 2]})


@pytest.fixture(scope="module")
def results(planned: Plan) -> dict[str, Any]:
    encode(planned.base.folder / "shared")
    for run in planned.runs:
        pretend(run)
    return planned.write()


# Measures of one curve


def test_steps_are_counted_to_nine_tenths_of_the_fall() -> None:
    assert steps_to_fall({10: 3.0, 20: 2.0, 40: 1.0}) == pytest.approx(36)  # 1.2 is a fifth before the end
    assert steps_to_fall({10: 3.0, 20: 0.0, 30: 4.0, 40: 1.0}) == pytest.approx(10 + 10 * 1.8 / 3)  # the first time
    assert steps_to_fall({10: 1.0, 20: 0.5, 30: 2.0}) is None
    assert steps_to_fall({10: 1.0}) is None and steps_to_fall({}) is None


def test_curves_are_normalised_to_their_own_ends() -> None:
    assert normalised({10: 5.0, 20: 4.0, 30: 1.0}) == {10: 1.0, 20: 0.75, 30: 0.0}
    assert normalised({10: 1.0, 20: 1.0}) == {}


def test_smoothing_keeps_lines_and_ends() -> None:
    line = {step: 3.0 - step / 10 for step in range(10, 80, 10)}
    assert smoothed(line) == pytest.approx(line)
    assert smoothed({1: 9.0, 2: 0.0, 3: 0.0, 4: 9.0, 5: 2.0}) == pytest.approx({1: 9, 2: 3, 3: 4, 4: 11 / 3, 5: 2})


# Conclusions


def test_conclusions_follow_sign_and_p() -> None:
    falling = {number: 10.0 - number for number in range(1, 6)}
    assert told_order(rank_order({0: falling}), "loss") == (
        "By loss, noisier clusters converge sooner (Kendall's tau −1.00, p 0.017)."
    )
    rising = {number: float(number) for number in range(1, 6)}
    assert "less noisy clusters converge sooner (Kendall's tau 1.00" in told_order(rank_order({0: rising}), "loss")
    mixed = {1: 1.0, 2: 5.0, 3: 2.0, 4: 3.0, 5: 4.0}
    assert "no order of clusters by noise can be told (Kendall's tau 0.40, p" in told_order(rank_order({0: mixed}), "x")
    assert "4 clusters are too few to show one" in told_order(rank_order({0: {n: float(n) for n in range(4)}}), "x")
    assert "there are no two clusters that differ" in told_order(None, "x")


def shaped(values: Sequence[float], error: float = 0.0) -> Entropies:
    times = [index / len(values) for index in range(len(values))]
    return Entropies(
        times=times, clusters=[1] * len(values), estimates=[Measured(value, error) for value in values],
        gaussian=list(values), middles={}, num_latents=1, dim=1,
    )  # fmt: skip


def test_the_shape_of_the_relative_entropy_is_computed() -> None:
    told = told_shape(shaped([8, 4, 2, 1]))
    assert "falls with noise throughout (Kendall's tau with time −1.00); it is largest at time 0, in cluster 1" in told
    assert "rises with noise throughout" in told_shape(shaped([1, 2, 3]))
    told = told_shape(shaped([2, 3, 1, 0.5]))
    assert "not monotone in noise: of 3 steps between neighbouring levels 1 rise and 2 fall" in told
    assert "largest at time 0.25" in told
    assert "falls with noise throughout" in told_shape(shaped([8, 4, 2, 2.1], error=0.1))  # a rise within the errors
    assert "shows no change with noise beyond its errors" in told_shape(shaped([2.2, 2, 2.1], error=0.1))


def test_relative_entropy_of_ddpm_falls_and_of_edm_does_not() -> None:
    """EDM's levels lie far apart at both ends of its normal, and on its path their scales differ."""
    latents = 0.01 * torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    single = CurriculumConfig(kind="single", num_clusters=5)
    found = relative_entropies(
        DiffusionConfig(schedule=ScheduleConfig(kind="ddpm"), curriculum=single), latents, draws=50
    )
    assert "falls with noise throughout" in told_shape(found)
    assert set(found.middles) == set(found.clusters) == {1, 2, 3, 4, 5}
    assert [found.clusters[at] for at in found.middles.values()] == list(found.middles)
    config = DiffusionConfig(
        schedule=ScheduleConfig(kind="edm"), path="ve", target="F", weight="edm", curriculum=single
    )
    assert "not monotone in noise" in told_shape(relative_entropies(config, latents, draws=50))


# Pretended runs


def test_clusters_are_told_with_their_times_and_steps(results: dict[str, Any]) -> None:
    first = results["clusters"]["1"]
    assert first["row"] == "part-1" and first["times"] == pytest.approx([0, 0.2])
    assert first["log_snrs"][1] == pytest.approx(9.2102, abs=1e-4)
    # Seed 0: 0.9 of the way from step 10 to 90. Seed 1 falls by 1.1, of which 0.99 are as far on the same line.
    assert first["held-out loss"]["steps_by_seed"] == pytest.approx({"0": 82.0, "1": 10 + 80 * 0.99})
    assert first["held-out loss"]["steps"]["value"] == pytest.approx(85.6)
    assert first["held-out loss"]["steps"]["n"] == 2 and first["held-out loss"]["fall"]["value"] == pytest.approx(1.05)
    assert first["held-out loss"]["normalised"]["10"]["value"] == 1
    assert first["held-out loss"]["normalised"]["90"]["value"] == pytest.approx((0 + 0.1 / 1.1) / 2)


def test_orders_are_told_apart_by_loss_and_by_score(results: dict[str, Any]) -> None:
    assert results["order"]["held-out loss"]["tau"] == pytest.approx(-1)
    assert results["order"]["held-out loss"]["p"] == pytest.approx(2 / 120)
    assert "By held-out loss, noisier clusters converge sooner" in results["conclusions"][0]
    # Goals 4.5, 4.4, none, 4.5 and 5.1: after 87.5, 47.5, -, 71.875 and 47.5 steps.
    steps = {number: told["fd"]["steps_by_seed"].get("0") for number, told in results["clusters"].items()}
    assert steps.pop("3") is None
    assert steps == pytest.approx({"1": 87.5, "2": 47.5, "4": 71.875, "5": 47.5})
    # Of the six pairs three fall (1-2, 1-4, 1-5), 2-5 is tied, 4-5 falls and 2-4 rises.
    assert results["order"]["fd"]["tau"] == pytest.approx((1 - 4) / (6 * 5) ** 0.5)
    assert "By Fréchet distance, no order" in results["conclusions"][1]


def test_final_scores_are_held_against_the_fixed_model_by_seed(results: dict[str, Any]) -> None:
    """4 against 5 and 6."""
    gap = results["clusters"]["1"]["final_minus_fixed_model"]
    assert gap["value"] == -1.5 and gap["interval"] == pytest.approx([-1.5 - 0.5 * 12.7062, -1.5 + 0.5 * 12.7062])
    assert results["fixed_model"] == "full"


def test_curves_that_do_not_fall_are_named(results: dict[str, Any]) -> None:
    told = "its Fréchet distance does not fall from its first value to its last, so that it has no steps"
    assert results["missing"] == [f"part-3 seed {seed}: {told}" for seed in (0, 1)]


def test_relative_entropy_is_that_of_the_latents_on_disk(results: dict[str, Any]) -> None:
    told = results["relative_entropy"]
    assert (told["num_latents"], told["dimensions"]) == (40, 8)
    assert told["times"][0] == pytest.approx(1 / 999) and told["times"][-1] == 1
    # Of the first step: eight dimensions of points, each 0.2055 (reference, DDPM).
    assert told["latents"]["values"][0] == pytest.approx(8 * 0.2055, rel=1e-3)
    assert len(told["latents"]["values"]) == len(told["gaussian"]) == len(told["clusters"]) > 35


def test_files_are_written_and_what_is_missing_is_named(plan: Plan) -> None:
    some = plan._replace(rows=[row for row in plan.rows if row.name != "part-4"])
    for run in some.runs:
        if run.row != "part-2" and run.seed == 0:
            pretend(run, held_out=False)
    some.write()
    told = (some.base.folder / "difficulty.md").read_text()
    for line in ("cluster 4: no row trains it", "part-2 seed 0: no result", "full seed 1: no result"):
        assert f"\n- {line}\n" in told
    assert "relative entropy: no latents on disk" in told and "One seed, hence no intervals" in told
    assert "against all renumberings" in told and "averaged weights" not in told
    assert "of the training loss, smoothed" in told and "| 2 | part-2 | 0.200 to 0.400 |" in told
    assert "| 1 | part-1 | 0.000 to 0.200 |" in told and "| −1.00 n=1 |" in told
    picture = (some.base.folder / "difficulty.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and 10_000 < len(picture) < 300_000


def test_a_study_that_has_not_begun_is_told_as_such(plan: Plan) -> None:
    told = plan.write()
    assert len(told["missing"]) == 13 and told["order"] == {"held-out loss": None, "fd": None}
    assert told["relative_entropy"] is None and "there are no two clusters that differ" in told["conclusions"][0]


def test_a_run_without_a_log_has_no_fall(plan: Plan) -> None:
    for run in plan.runs:
        pretend(run)
        write(run.folder / "diffusion" / "metrics.jsonl", "")
    told = plan.write()
    assert told["clusters"]["1"]["training loss, smoothed"]["fall"] is None
    assert told["missing"][0].startswith("part-1 seed 0: its training loss, smoothed does not fall")


def test_many_clusters_are_tested_on_random_renumberings() -> None:
    clusters = [Cluster(number=n, row=f"part-{n}", times=(0.0, 1.0), levels=(0.0, 1.0)) for n in range(1, 10)]
    loss = Convergence(name="held-out loss", lines={})
    told = Difficulty(clusters=clusters, loss=loss, score=None, gaps={}, fixed=None, entropies=None, missing=[])
    text = difficulty_markdown(told, title="Nine")
    assert "against 20,000 random renumberings" in text and "averaged weights" in text


def test_a_study_without_scores_over_training_tells_the_loss_alone(plan: Plan) -> None:
    alone = plan.changed(curve=CurveConfig(stage="diffusion", metric="loss"), seeds=(0,))
    for run in alone.runs:
        pretend(run)
    told = alone.write()
    assert list(told["order"]) == ["held-out loss"] and "fd" not in told["clusters"]["1"]


def test_runs_with_problems_are_left_out(plan: Plan) -> None:
    for run in plan.runs:
        pretend(run)
    problems = {"part-1 seed 1": "its fd was measured under another size"}
    write_difficulty(plan.study, plan.rows, plan.runs, problems, plan.base.folder)
    told = json.loads((plan.base.folder / "difficulty.json").read_text())
    assert told["missing"][0] == "part-1 seed 1: no result" and list(told["clusters"]["1"]["fd"]["steps_by_seed"]) == [
        "0"
    ]


def varied(row: Row, **changes: Any) -> Row:
    """A row with other settings of diffusion."""
    assert row.experiment.diffusion is not None
    experiment = dataclasses.replace(row.experiment, diffusion=dataclasses.replace(row.experiment.diffusion, **changes))
    return dataclasses.replace(row, experiment=experiment)


def test_rows_must_divide_one_noise_axis(plan: Plan) -> None:
    full, *parts, last = plan.rows
    check_difficulty(plan.study, plan.rows)
    curriculum = CurriculumConfig(kind="single", num_clusters=6, cluster=5)
    twin = dataclasses.replace(last, name="again")
    for rows, message in (
        ([full, *parts[:2]], "at least three, but there are 2"),
        ([*plan.rows, twin], "part-5 and again both train cluster 5"),
        ([*parts, varied(last, curriculum=curriculum)], "the same curriculum.num_clusters"),
        ([*parts, varied(last, schedule=ScheduleConfig(kind="cosine"))], "with one noise axis"),
    ):
        with pytest.raises(ValueError, match=message):
            check_difficulty(plan.study, rows)
    check_difficulty(dataclasses.replace(plan.study, difficulty=False), [full])


@pytest.mark.parametrize("outside", [None, "runs/other"])
def test_scored_copies_serve_inside_one_model(plan: Plan, outside: str | None) -> None:
    sample = DiffusionSampleConfig(outside=outside)
    rows = [*plan.rows[:-1], varied(plan.rows[-1], sample=sample)]
    with pytest.raises(ValueError, match=r"set diffusion\.sample\.outside of all rows of one cluster to one model"):
        check_difficulty(plan.study, rows)
    loss = CurveConfig(stage="diffusion", metric="loss")
    check_difficulty(dataclasses.replace(plan.study, curve=loss), rows)


def test_a_dry_run_refuses_rows_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"study\.difficulty=true compares rows with diffusion\.curriculum\.kind=single"
    ):
        tell(*loaded(tmp_path, rows={"full": {}}))


# The study itself


class Inside:
    """In the place of a process: carries a command out at once, in this one, and keeps what it says."""

    def __init__(self, words: Sequence[str], *, stdout: io.BufferedWriter, **_: Any) -> None:
        self.code, heard = 0, io.StringIO()
        with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
            try:
                main(words[3:])  # python -m tokenloom
            except SystemExit as error:
                self.code = int(error.code or 0)
        stdout.write(heard.getvalue().encode())

    def poll(self) -> int:
        return self.code


def final_score(row: Path) -> float:
    records = json.loads((row / "seed-0" / "eval" / "metrics.json").read_text())
    (value,) = (each["value"] for each in records if (each["subject"], each["name"][:3]) == ("diffusion", "fd_"))
    return float(value)


@pytest.mark.slow
def test_the_study_runs_from_the_tokenizer_to_the_conclusions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {name: getattr(subprocess, name) for name in ("STDOUT", "DEVNULL")}
    monkeypatch.setattr(study_jobs, "subprocess", SimpleNamespace(Popen=Inside, **there))
    words = [
        "--run.root", str(tmp_path), "--run.device=cpu", "--study.seeds=[0]", "--data.size=16",
        "--tokenizer.train.steps=4", "--tokenizer.train.warmup_steps=0", "--tokenizer.train.batch_size=8",
        "--diffusion.model.depth=1", "--diffusion.model.width=16", "--diffusion.model.heads=2",
        "--diffusion.train.steps=24", "--diffusion.train.warmup_steps=0", "--diffusion.train.batch_size=8",
        "--diffusion.train.preview_every=12", "--diffusion.train.snapshot_every=12", "--diffusion.sample.num_steps=5",
        "--eval.num_samples=20",
    ]  # fmt: skip
    main(["study", "--config", str(CONFIG), *words])
    folder = tmp_path / "study-difficulty"
    told = json.loads((folder / "difficulty.json").read_text())
    assert all("does not fall" in each for each in told["missing"])
    assert told["fixed_model"] == "full" and list(told["clusters"]) == list("12345")
    alone = final_score(folder / "full")
    for number, cluster in told["clusters"].items():
        assert list(cluster["held-out loss"]["normalised"]) in ([], ["12", "24"])
        gap = final_score(folder / f"cluster-{number}") - alone
        assert gap != 0
        assert cluster["final_minus_fixed_model"] == {"value": pytest.approx(gap), "interval": None, "n": 1}
    assert told["relative_entropy"]["num_latents"] == 1438 and "Kendall" in (folder / "difficulty.md").read_text()
