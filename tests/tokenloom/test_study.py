"""Studies: rows of equal cost, runs apart from each other, intervals as textbooks have them, results that tell all."""

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
import yaml
from PIL import Image

from engine.flops import forward_flops
from engine.signals import Interrupted
from tokenizer.model import Tokenizer
from tokenloom import study_jobs
from tokenloom.cli import main
from tokenloom.experiment import Experiment
from tokenloom.study import run_study, tell
from tokenloom.study_config import StudyConfig, load_study, study_yaml, vary
from tokenloom.study_costs import Cost, training_costs
from tokenloom.study_jobs import Ledger, finished
from tokenloom.study_plan import plan_rows, plan_runs
from tokenloom.study_statistics import excludes_zero, mean_interval, paired_difference

TOWER = {"blocks": 1, "width": 16, "heads": 2, "mlp": 32}
STUDY: dict[str, Any] = {
    "title": "Small", "question": "Does it work?", "seeds": [0, 1, 2], "jobs": 2,
    "metrics": [{"name": "psnr"}, {"name": "usage"}, {"name": "rfd", "better": "lower"}, {"name": "images_per_second"}],
    "rows": {
        "base": {},
        "dim-2": {"tokenizer.model.code_dim": 2},
        "dim-64": {"tokenizer.model.code_dim": 64},
        "deep": {"tokenizer.model.encoder.blocks": 3},
    },
    "groups": [{"title": "Dimension", "rows": ["dim-2", "base", "dim-64"], "x": "tokenizer.model.code_dim"}],
}  # fmt: skip
MODEL = {"patch_size": 8, "vocab_size": 16, "code_dim": 4, "encoder": TOWER, "decoder": TOWER}
TRAIN = {"steps": 40, "batch_size": 8, "log_every": 10, "preview_every": 20}

# Stands in for the command line: writes what training and scoring would leave, as a function of settings and seed.
PROGRAM = """
import json, pathlib, sys, yaml
command, _, path, *_ = sys.argv[1:]
config = yaml.safe_load(open(path))
folder = pathlib.Path(config["run"]["root"]) / config["run"]["name"]
tokenizer, seed = config["tokenizer"], config["run"]["seed"]
dim, steps = tokenizer["model"]["code_dim"], tokenizer["train"]["steps"]
if dim == 64 and seed == 1:
    sys.exit("tokenloom: code_dim=64 has had enough")
with open(folder / "calls", "a") as calls:
    print(command, file=calls)
(folder / "tokenizer").mkdir(exist_ok=True)
(folder / "eval").mkdir(exist_ok=True)
if command == "tokenizer":
    lines = [{"step": steps * k // 2, "validation/psnr": 10.0 + k + seed, "samples_per_second": 100.0} for k in (1, 2)]
    (folder / "tokenizer" / "metrics.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
else:
    scores = {"psnr": 20 + dim + seed, "usage": 0.5 + 0.01 * seed, "rfd_random": 3.0 - 0.1 * dim + 0.01 * seed * dim}
    told = {"judge": 1, "size": 16, "num_real": 40, "data": {"source": "digits"}}
    told = {name: {**told, "features": {"name": "random", "weights": "f00d"}} if "rfd" in name else told
            for name in scores}
    records = [{"name": name, "subject": "tokenizer", "value": value, "interval": None, "n": 40, "protocol": told[name]}
               for name, value in scores.items()]
    (folder / "eval" / "metrics.json").write_text(json.dumps(records))
"""
WAITING = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[3]).parent
def leave(*_):
    (folder / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, leave)
(folder / "begun").touch()
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path)


def write(folder: Path, *, tokenizer: dict[str, Any] | None = None, **changes: Any) -> Path:
    groups = {"groups": []} if "rows" in changes else {}
    content = {
        "study": {**STUDY, **groups, **changes},
        "run": {"name": "small", "root": str(folder / "runs"), "device": "cpu", "precision": "fp32"},
        "data": {"source": "digits", "size": 16},
        "tokenizer": {"model": MODEL, "train": TRAIN, **(tokenizer or {})},
        "eval": {"features": ["random"], "num_samples": 40, "num_reconstructions": 40},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "study.yaml"


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A study of two rows, which is planned and drawn sooner."""
    return write(tmp_path, rows={"base": {}, "dim-2": {"tokenizer.model.code_dim": 2}})


def loaded(path: Path, *words: str) -> tuple[StudyConfig, Experiment]:
    return load_study(["--config", str(path), *words])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_jobs, "PROGRAM", (sys.executable, "-c", PROGRAM))
    monkeypatch.setattr(study_jobs, "GLANCE", 0.01)


# Statistics


@pytest.mark.parametrize("values", [[1.0, 2.0], [24.5, 24.4, 24.7], [0.1, -0.3, 0.2, 5.0, 1e3]])
def test_the_interval_is_students(values: list[float]) -> None:
    low, high = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    estimate = mean_interval(values)
    assert estimate.value == pytest.approx(sum(values) / len(values))
    assert estimate.interval == pytest.approx((low, high))


def test_two_values_reach_as_cauchys_distribution_says() -> None:
    """One degree of freedom: t = tan(pi (p - 1/2)) = 12.706 at p = 0.975, times half the distance of the values."""
    assert mean_interval([3.0, 5.0]).interval == pytest.approx((4 - 12.7062047, 4 + 12.7062047))


def test_one_value_has_no_interval_and_none_is_an_error() -> None:
    assert mean_interval([7.0]) == (7.0, None)
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([])


def test_differences_are_paired_by_seed() -> None:
    values, baseline = {0: 24.0, 1: 26.1, 2: 25.0}, {2: 24.7, 0: 23.8, 1: 25.8, 9: 0.0}
    told = paired_difference(values, baseline)
    assert told is not None
    estimate, n = told
    test = scipy.stats.ttest_rel([24.0, 26.1, 25.0], [23.8, 25.8, 24.7])
    assert n == 3 and estimate.interval == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert excludes_zero(estimate) == (test.pvalue < 0.05)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_pairing_takes_out_what_a_seed_does_to_all_rows() -> None:
    baseline = {0: 1.0, 1: 100.0, 2: -50.0}
    told = paired_difference({seed: value + 0.5 for seed, value in baseline.items()}, baseline)
    assert told is not None and told[0].interval == pytest.approx((0.5, 0.5))


# Costs


def test_steps_within_a_budget_undo_its_total() -> None:
    for cost in (Cost(3e9), Cost(3e9, 5e9), Cost(3e9, 5e9, 100)):
        for steps in (1, 99, 100, 101, 5000):
            assert cost.steps_within(cost.total(steps)) == steps


def test_an_opponent_that_joins_late_costs_nothing_before() -> None:
    assert Cost(2.0, 3.0, 10).total(10) == 20 and Cost(2.0, 3.0, 10).total(12) == 30


def test_a_training_step_costs_three_forward_passes_of_the_batch(path: Path) -> None:
    _, base = loaded(path)
    model = Tokenizer(base.tokenizer.model, image_size=16)
    forward = forward_flops(model, torch.zeros(1, 3, 16, 16))
    assert training_costs(base)["tokenizer"].total(7) == pytest.approx(7 * 8 * 3 * forward)


def test_a_discriminator_counts_where_a_row_has_one(tmp_path: Path) -> None:
    words = ("--tokenizer.discriminator.channels=8", "--tokenizer.discriminator.channel_base=64")
    _, base = loaded(write(tmp_path), *words)
    cost = [training_costs(changed)["tokenizer"] for changed in (
        base,
        opposed(base, adversarial=0.1, start_step=0),
        opposed(base, adversarial=0.1, start_step=30),
    )]  # fmt: skip
    assert cost[0].own == cost[2].own < cost[1].own
    assert cost[2].start == 30 and cost[2].own + cost[2].opponent == pytest.approx(cost[1].own)


def opposed(base: Experiment, *, adversarial: float, start_step: int) -> Experiment:
    loss = dataclasses.replace(base.tokenizer.loss, adversarial=adversarial)
    opponent = dataclasses.replace(base.tokenizer.discriminator, start_step=start_step)
    return dataclasses.replace(base, tokenizer=dataclasses.replace(base.tokenizer, loss=loss, discriminator=opponent))


# Configuration and plan


def test_rows_train_on_the_flops_of_the_baseline(path: Path) -> None:
    study, base = loaded(path)
    rows = {row.name: row for row in plan_rows(study, base)}
    assert rows["base"].steps == {"tokenizer": 40}
    assert rows["deep"].steps["tokenizer"] < 40
    for row in rows.values():
        assert row.flops == pytest.approx(rows["base"].flops, abs=0.51 * row.costs["tokenizer"].own)
    equal = plan_rows(dataclasses.replace(study, budget="steps"), base)
    assert {row.steps["tokenizer"] for row in equal} == {40}


def test_every_stage_has_the_flops_of_the_baselines(tmp_path: Path) -> None:
    rows = {"base": {}, "deep": {"diffusion.model.depth": 4}}
    path = write(tmp_path, stages="all", rows=rows)
    words = ["--diffusion.model.preset=tiny", "--diffusion.model.depth=2", "--diffusion.train.steps=100"]
    rows_planned = plan_rows(*loaded(path, *words))
    assert [row.steps["tokenizer"] for row in rows_planned] == [40, 40]
    base, deep = rows_planned
    assert deep.steps["diffusion"] < base.steps["diffusion"] == 100
    cost = [row.costs["diffusion"].total(row.steps["diffusion"]) for row in rows_planned]
    assert cost[1] == pytest.approx(cost[0], abs=0.51 * deep.costs["diffusion"].own)


def test_another_row_may_be_the_baseline(pair: Path) -> None:
    study, base = loaded(pair, "--study.baseline=dim-2", "--tokenizer.train.steps=4000")
    rows = {row.name: row for row in plan_rows(study, base)}
    assert rows["dim-2"].steps["tokenizer"] == 4000 > rows["base"].steps["tokenizer"]


def test_a_row_changes_what_it_names_and_nothing_else(path: Path) -> None:
    study, base = loaded(path, "--tokenizer.model.vocab_size=32")
    deep = vary(base, study.rows[3])
    tower = dataclasses.replace(base.tokenizer.model.towers[0], blocks=3)
    model = dataclasses.replace(base.tokenizer.model, encoder=tower)
    assert base.tokenizer.model.vocab_size == 32
    assert deep == dataclasses.replace(base, tokenizer=dataclasses.replace(base.tokenizer, model=model))


def test_every_run_is_an_ordinary_run_with_its_seed(pair: Path) -> None:
    study, base = loaded(pair)
    runs = plan_runs(study, plan_rows(study, base), study.seeds, base.run)
    assert [run.seed for run in runs] == [0, 0, 1, 1, 2, 2]  # whole seeds first
    assert len({run.folder for run in runs}) == 6
    assert all(run.experiment.run.seed == run.seed for run in runs)
    assert runs[3].folder == base.run.folder / "dim-2" / "seed-1"


def test_the_file_that_a_study_keeps_reads_back(path: Path, tmp_path: Path) -> None:
    study, base = loaded(path, "--study.jobs=3", "--tokenizer.train.learning_rate=0.5")
    again = tmp_path / "again.yaml"
    again.write_text(study_yaml(study, base))
    assert loaded(again) == (study, base)


def test_a_second_file_lies_over_the_first(path: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.yaml"
    more.write_text("tokenizer: {model: {vocab_size: 64}}\n")
    study, base = load_study(["--config", str(path), f"--config={more}"])
    assert base.tokenizer.model.vocab_size == 64 and base.tokenizer.model.code_dim == 4
    assert study == loaded(path)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"titel": "x"}, "did you mean 'study.title'"),
        ({"title": ""}, "title, metrics and rows must not be empty"),
        ({"seeds": [1, 1]}, "study.seeds=.1, 1. must be different"),
        ({"jobs": 0}, "study.jobs=0"),
        ({"budget": "hours"}, "hours"),
        ({"baseline": "bas"}, "study.baseline: unknown 'bas'; did you mean 'base'"),
        ({"metrics": [{"nam": "psnr"}]}, "unknown 'nam'; did you mean 'name'"),
        ({"groups": [{"title": "A", "rows": ["dim-3"]}]}, "unknown 'dim-3'; did you mean 'dim-"),
        ({"rows": ["base"]}, "expected names of rows"),
        ({"rows": {"../up": {}}}, "cannot name a folder"),
        ({"rows": {"a": {"tokenizer.train.steps": 3}}}, "steps of its runs are chosen by the study"),
        ({"rows": {"a": {"run.seed": 3}}}, "a row cannot set this key"),
        ({"rows": {"a": {"diffusion.path": "vp"}}}, "changes nothing: study.stages=tokenizer"),
        ({"rows": {"a": {}, "b": {"tokenizer.model.codedim": 3}}}, "study.rows.b: did you mean 'tokenizer.model.code_"),
        ({"rows": {"a": {"tokenizer.model.code_dim": 0}}}, "study.rows.a: model.code_dim=0 must be at least 2"),
        ({"rows": {"a": {"tokenizer.model.code_dim.x": 0}}}, "'code_dim' is a value, not a section"),
        ({"groups": [{"title": "A", "rows": ["base"], "x": "data.source"}]}, "x=data.source is 'digits' in the row"),
        ({"curve": {"stage": "diffusion", "metric": "loss"}}, "study.curve.stage=diffusion is not trained by"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tell(*loaded(write(tmp_path, **changes)))


def test_a_budget_that_ends_within_the_warm_up_is_refused(tmp_path: Path) -> None:
    train = {**TRAIN, "warmup_steps": 39}
    study, base = loaded(write(tmp_path, tokenizer={"train": train}))
    with pytest.raises(ValueError, match=r"study.rows.dim-64: the budget is \d+ steps, no more than tokenizer"):
        plan_rows(study, base)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no --config FILE given"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--config", "STUDY", "--config", "STUDY"], "2 sections `study`"),
        (["--config", "STUDY", "--study.job=3"], "did you mean 'study.jobs'"),
        (["--config", "STUDY", "--tokenizer.model.codedim=3"], "did you mean 'tokenizer.model.code_dim'"),
        (["--config", "STUDY", "--only", "bas"], "--only: unknown 'bas'"),
        (["--config", "STUDY", "--seeds", "one"], "--seeds=one must be numbers"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(
    path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["study", *(str(path) if word == "STUDY" else word for word in words)])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_tells_rows_steps_flops_and_time_and_writes_nothing(pair: Path) -> None:
    told = tell(*loaded(pair), only=["dim-2"], seeds=[0, 5])
    assert "1 rows x 2 seeds (0, 5) = 2 runs, 2 not done" in told
    assert "code_dim=2" in told and "measured here and now" in told and "\nbase" not in told
    assert not (pair.parent / "runs").exists()


# Runs


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    study, base = loaded(write(tmp_path_factory.mktemp("done")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_jobs, "PROGRAM", (sys.executable, "-c", PROGRAM))
        run_study(study, base)
    return base.run.folder, json.loads((base.run.folder / "results.json").read_text())


def test_a_failing_run_is_named_and_stops_no_other(done: tuple[Path, dict[str, Any]]) -> None:
    folder, results = done
    assert list(results["problems"]) == ["dim-64 seed 1"]
    assert "code_dim=64 has had enough" in results["problems"]["dim-64 seed 1"]
    states = {name: [run["state"] for run in row["runs"].values()] for name, row in results["rows"].items()}
    assert states == {
        "base": ["done"] * 3, "dim-2": ["done"] * 3, "dim-64": ["done", "failed", "done"], "deep": ["done"] * 3,
    }  # fmt: skip
    assert "dim-64 seed 1" in (folder / "results.md").read_text()


def test_the_results_tell_values_means_and_paired_differences(done: tuple[Path, dict[str, Any]]) -> None:
    folder, results = done
    rows = results["rows"]
    assert rows["dim-2"]["runs"]["1"]["scores"]["tokenizer/psnr"] == 23
    mean = rows["dim-2"]["means"]["tokenizer/psnr"]
    reach = 4.30265273 / 3**0.5  # t at two degrees of freedom, standard deviation 1
    assert mean["value"] == 23 and mean["n"] == 3 and mean["interval"] == pytest.approx([23 - reach, 23 + reach])
    assert rows["dim-2"]["differences"]["tokenizer/psnr"] == {"value": -2, "interval": [-2, -2], "n": 3}
    assert rows["dim-64"]["differences"]["tokenizer/psnr"]["n"] == 2
    assert rows["base"]["differences"]["tokenizer/psnr"] is None
    assert results["metrics"]["tokenizer/rfd"]["name"] == "rfd_random"
    assert results["metrics"]["tokenizer/rfd"]["protocol"]["features"]["name"] == "random"
    table = (folder / "results.md").read_text()
    assert "| dim-2 | 3 | " in table and "**−2.00 (−2.00 to −2.00)**" in table
    assert "51.0 (48.5 to 53.5)" in table  # usage in per cent


def test_the_pictures_are_small_and_wide_enough(done: tuple[Path, dict[str, Any]]) -> None:
    for name in ("plot.png", "curves.png"):
        file = done[0] / name
        assert file.stat().st_size < 300_000
        with Image.open(file) as image:
            assert 600 <= image.width <= 1400


def test_the_same_call_does_only_what_is_not_done(pair: Path, quick: None) -> None:
    study, base = loaded(pair)
    run_study(study, base, only=["base"], seeds=[0, 7])
    calls = base.run.folder / "base" / "seed-0" / "calls"
    found = run_study(study, base, only=["base"])
    assert calls.read_text() == "tokenizer\neval\n"
    assert sorted(found.values["tokenizer/psnr"]["base"]) == [0, 1, 2]
    found = run_study(study, base, seeds=[7], report_only=True)
    assert sorted(found.values["tokenizer/psnr"]["base"]) == [0, 1, 2, 7]
    assert found.runs["dim-2"][0]["state"] == "not done" and not found.problems


def test_a_run_under_other_settings_does_not_pass_for_this_one(pair: Path, quick: None) -> None:
    study, base = loaded(pair)
    run_study(study, base, only=["base"], seeds=[0])
    study, base = loaded(pair, "--tokenizer.loss.commitment=0.5")
    found = run_study(study, base, report_only=True)
    assert found.runs["base"][0]["state"] == "done under another tokenizer.loss.commitment"
    assert not found.values["tokenizer/psnr"]["base"]


def test_a_score_of_another_protocol_is_left_out_and_named(pair: Path, quick: None) -> None:
    study, base = loaded(pair)
    run_study(study, base, seeds=[0])
    scores = base.run.folder / "dim-2" / "seed-0" / "eval" / "metrics.json"
    scores.write_text(scores.read_text().replace('"num_real": 40', '"num_real": 41'))
    found = run_study(study, base, report_only=True)
    assert "was measured under another num_real" in found.problems["dim-2 seed 0"]
    assert not found.values["tokenizer/psnr"]["dim-2"] and found.values["tokenizer/psnr"]["base"] == {0: 24}


def test_one_run_is_never_computed_twice_at_a_time(pair: Path, quick: None) -> None:
    study, base = loaded(pair)
    folder = base.run.folder / "base" / "seed-0"
    folder.mkdir(parents=True)
    held = study_jobs._lock(folder)
    try:
        found = run_study(study, base, only=["base"], seeds=[0])
    finally:
        os.close(held)
    assert "another process is still at it" in found.problems["base seed 0"]
    assert not run_study(study, base, only=["base"], seeds=[0]).problems


def test_an_interrupted_study_lets_its_runs_save_and_leave(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_jobs, "PROGRAM", (sys.executable, "-c", WAITING))
    study, base = loaded(pair)
    folders = [base.run.folder / name / "seed-0" for name in ("base", "dim-2")]

    def press() -> None:
        while not all((folder / "begun").exists() for folder in folders):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(Interrupted) as left:
        run_study(study, base)
    assert left.value.code == 130
    assert all((folder / "saved").exists() for folder in folders)
    assert not (base.run.folder / "base" / "seed-1").exists()  # nothing new was begun
    monkeypatch.setattr(study_jobs, "PROGRAM", (sys.executable, "-c", PROGRAM))
    assert not run_study(study, base, seeds=[0]).problems


def test_times_to_come_are_told_by_times_of_before(pair: Path) -> None:
    study, base = loaded(pair)
    runs = plan_runs(study, plan_rows(study, base), [0, 1], base.run)
    assert Ledger(runs).expected(runs[0]) == float("inf")
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / "study.json").write_text(json.dumps({"settings": runs[0].settings, "seconds": 60.0}))
    assert finished(runs[0]) and not finished(runs[2])
    ledger = Ledger(runs)
    assert ledger.expected(runs[2]) == pytest.approx(60)
    assert ledger.expected(runs[1]) == pytest.approx(60 * runs[1].flops / runs[0].flops)
    ledger.add(runs[1], 10)
    assert ledger.expected(runs[3]) == pytest.approx(10)


@pytest.mark.slow
def test_the_command_trains_scores_and_reports(pair: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["study", "--config", str(pair), "--seeds", "0", "--only", "dim-2"]
    main(words)
    results = json.loads((pair.parent / "runs" / "small" / "results.json").read_text())
    scores = results["rows"]["dim-2"]["runs"]["0"]["scores"]
    assert set(scores) == {f"tokenizer/{name}" for name in ("psnr", "usage", "rfd", "images_per_second")}
    main(words)
    assert "1 run, 1 done before" in capfd.readouterr().out
