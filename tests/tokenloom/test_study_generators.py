"""Studies of generators: one tokenizer for all rows, scores of variants and snapshots, a curve of scores by steps."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tokenloom import study_jobs
from tokenloom.cli import main
from tokenloom.experiment import Experiment
from tokenloom.study import run_study, tell
from tokenloom.study_config import StudyConfig, load_study
from tokenloom.study_costs import passes_per_sample, sample_passes
from tokenloom.study_jobs import changed_settings, finished
from tokenloom.study_plan import Run, plan_rows, plan_runs, shared_run

REAL_PROGRAM = study_jobs.PROGRAM
TOWER = {"blocks": 1, "width": 16, "heads": 2, "mlp": 32}
TRAIN = {"steps": 20, "batch_size": 8, "log_every": 10, "preview_every": 20, "snapshot_every": 8}
CONTENT: dict[str, Any] = {
    "study": {
        "title": "Small", "stages": "generator", "seeds": [0, 1], "budget": "steps", "jobs": 2,
        "metrics": [
            {"name": "fd", "subject": "diffusion", "better": "lower"},
            {"name": "fd", "subject": "diffusion@cfg2", "better": "lower"},
        ],
        "curve": {"stage": "diffusion", "score": "fd"},
        "rows": {"cosine": {}, "laplace": {"diffusion.schedule.kind": "laplace"}},
    },
    "run": {"name": "small", "device": "cpu", "precision": "fp32", "seed": 3},
    "data": {"source": "digits", "size": 16},
    "tokenizer": {
        "model": {"patch_size": 8, "code_dim": 4, "encoder": TOWER, "decoder": TOWER},
        "quantizer": {"kind": "kl"},
        "train": {"steps": 4, "batch_size": 8, "preview_every": 0},
    },
    "diffusion": {
        "model": {"depth": 1, "width": 16, "heads": 2}, "train": TRAIN, "sample": {"num_steps": 3, "guidance": 1.5},
    },
    "eval": {
        "features": ["random"], "num_samples": 20, "snapshots": True,
        "variants": {"cfg2": {"diffusion.sample.guidance": 2}},
    },
}  # fmt: skip

# Stands in for the command line: notes its calls and leaves what it would leave, with scores of settings and seed.
PROGRAM = """
import json, pathlib, sys, yaml
command, _, path, *options = sys.argv[1:]
config = yaml.safe_load(open(path))
folder = pathlib.Path(config["run"]["root"]) / config["run"]["name"]
with open(folder / "calls", "a") as calls:
    print(command, *options, file=calls)
def write(name, content):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
if command == "tokenizer":
    if config["tokenizer"]["loss"]["l2"] == 9:
        sys.exit("tokenloom: l2=9 has had enough")
    write("tokenizer/model.json", {"fingerprint": "f00d" + str(config["run"]["seed"])})
elif command == "encode":
    views = config["tokenizer"]["views"]
    write("codes/train/meta.json", {"augmentation": {"views": views} if views > 1 else {}})
elif command == "eval":
    kind, seed = config["diffusion"]["schedule"]["kind"], config["run"]["seed"]
    assert pathlib.Path(config["run"]["tokenizer"], "tokenizer", "model.json").exists()
    base = {"cosine": 8.0, "laplace": 6.0}[kind] + seed
    values = {"diffusion": base, "diffusion@cfg2": base / 2, "diffusion@step8": base + 20, "diffusion@step16": base + 4}
    told = {"judge": 1, "size": 16, "num_real": 20, "num_generated": 20, "features": {"name": "r", "weights": "beef"}}
    sampled = {"subject": {"settings": {"solver": "ddim", "num_steps": 3}}}
    write("eval/metrics.json", [
        {"name": "fd_random", "subject": subject, "value": value, "interval": None, "n": 20, "protocol": told | sampled}
        for subject, value in values.items()])
"""


def loaded(folder: Path, *words: str, **changes: Any) -> tuple[StudyConfig, Experiment]:
    content = {**CONTENT, "study": {**CONTENT["study"], **changes}}
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return load_study(["--config", str(folder / "study.yaml"), f"--run.root={folder / 'runs'}", *words])


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_jobs, "PROGRAM", (sys.executable, "-c", PROGRAM))
        patch.setattr(study_jobs, "GLANCE", 0.01)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, quick: None) -> Path:
    """The folder of a file of a study that has been carried out."""
    folder = tmp_path_factory.mktemp("done")
    assert not run_study(*loaded(folder)).problems
    return folder


@pytest.fixture
def copied(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "copy"))


def first_cosine(folder: Path) -> Run:
    study, base = loaded(folder)
    return next(run for run in plan_runs(study, plan_rows(study, base), [0], base.run) if run.row == "cosine")


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_the_tokenizer_is_trained_once_and_every_run_takes_it(done: Path) -> None:
    study, base = loaded(done)
    folder = base.run.folder
    assert calls(folder / "shared") == ["tokenizer", "encode"]
    for name in ("cosine", "laplace"):
        for seed in (0, 1):
            run = folder / name / f"seed-{seed}"
            assert calls(run) == ["generator", "eval --only fid"]
            assert yaml.safe_load((run / "config.yaml").read_text())["run"]["tokenizer"] == str(folder / "shared")
    shared = yaml.safe_load((folder / "shared" / "config.yaml").read_text())
    assert (shared["run"]["seed"], shared["diffusion"], shared["autoregressive"]) == (3, None, None)
    run_study(study, base)
    assert calls(folder / "shared") == ["tokenizer", "encode"]
    assert len(calls(folder / "laplace" / "seed-1")) == 2


def test_scores_of_variants_and_snapshots_are_in_the_results(done: Path) -> None:
    _, base = loaded(done)
    results = json.loads((base.run.folder / "results.json").read_text())
    assert results["rows"]["laplace"]["means"]["diffusion@cfg2/fd"]["value"] == 3.25
    assert results["rows"]["laplace"]["differences"]["diffusion/fd"]["interval"] == [-2, -2]
    curve = results["rows"]["cosine"]["curve"]
    assert {step: told["value"] for step, told in curve.items()} == {"8": 28.5, "16": 12.5, "20": 8.5}
    assert curve["8"]["n"] == 2 and curve["8"]["interval"][0] < 28
    told = (base.run.folder / "results.md").read_text()
    assert "| row | 8 | 16 | 20 |" in told and "| laplace | 26.5 (" in told
    assert "All rows take one tokenizer and its codes" in told and "20 samples against 20 training images" in told
    assert "`diffusion@cfg2`: solver ddim, num_steps 3" in told
    assert (base.run.folder / "curves.png").stat().st_size > 5_000


def test_a_tokenizer_that_fails_stops_the_study_with_its_words(tmp_path: Path, quick: None) -> None:
    study, base = loaded(tmp_path, "--tokenizer.loss.l2=9")
    found = run_study(study, base)
    assert list(found.problems) == ["shared seed 3"] and "l2=9 has had enough" in found.problems["shared seed 3"]
    assert not (base.run.folder / "cosine").exists()


def test_another_tokenizer_makes_other_results(copied: Path) -> None:
    """The settings of a run name the very tokenizer, so that results of an exchanged one do not pass for these."""
    study, base = loaded(copied)
    (base.run.folder / "shared" / "tokenizer" / "model.json").write_text('{"fingerprint": "another"}')
    found = run_study(study, base, report_only=True)
    assert found.runs["cosine"][0]["state"] == "done under another tokenizer.fingerprint"


def test_codes_that_were_made_otherwise_make_other_results(copied: Path) -> None:
    """Two sets of views under one tokenizer."""
    run = first_cosine(copied)
    assert finished(run)
    (run.folder.parents[1] / "shared" / "codes" / "train" / "meta.json").write_text('{"augmentation": {"views": 4}}')
    assert not finished(run) and "tokenizer.augmentation.views" in changed_settings(run)


def test_results_of_before_codes_were_told_stay_valid(copied: Path) -> None:
    run = first_cosine(copied)
    told = json.loads((run.folder / "study.json").read_text())
    del told["settings"]["tokenizer"]["augmentation"]
    (run.folder / "study.json").write_text(json.dumps(told))
    assert finished(run)
    told["settings"]["tokenizer"]["fingerprint"] = "another"
    (run.folder / "study.json").write_text(json.dumps(told))
    assert not finished(run) and changed_settings(run) == ["tokenizer.fingerprint"]


def test_results_outlive_settings_that_come_later(copied: Path) -> None:
    """A study that was carried out before a setting existed counts as having had its default."""
    run = first_cosine(copied)
    path = run.folder / "study.json"
    told = json.loads(path.read_text())
    del told["settings"]["diffusion"]["model"]["rope"], told["settings"]["eval"]["lpips"]
    path.write_text(json.dumps(told))
    assert finished(run)
    told["settings"]["diffusion"]["model"]["rope"] = True
    path.write_text(json.dumps(told))
    assert not finished(run) and changed_settings(run) == ["diffusion.model.rope"]


def test_a_tokenizer_that_is_there_is_taken_as_it_is(tmp_path: Path) -> None:
    study, base = loaded(tmp_path, "--run.tokenizer=runs/trained")
    assert shared_run(study, base) is None
    with pytest.raises(ValueError, match=r"run\.tokenizer=runs/trained: .* holds no finished tokenizer"):
        plan_rows(study, base)


def test_rows_cannot_vary_a_tokenizer_that_is_there(tmp_path: Path) -> None:
    changes = {"stages": "all", "rows": {"a": {}, "b": {"tokenizer.loss.l2": 2}}}
    with pytest.raises(ValueError, match=r"study\.rows\.b\.tokenizer\.loss\.l2 changes nothing: run\.tokenizer=x"):
        plan_rows(*loaded(tmp_path, "--run.tokenizer=x", **changes))


def test_the_budget_counts_the_generators_alone(tmp_path: Path) -> None:
    rows = {"base": {}, "deep": {"diffusion.model.depth": 2}}
    study, base = loaded(tmp_path, budget="flops", rows=rows)
    small, deep = plan_rows(study, base)
    assert list(small.costs) == ["diffusion"] and deep.steps["diffusion"] < small.steps["diffusion"] == 20
    assert deep.flops == pytest.approx(small.flops, abs=0.51 * deep.costs["diffusion"].own)
    runs = plan_runs(study, [small, deep], [0], base.run)
    assert {run.experiment.run.tokenizer for run in runs} == {str(base.run.folder / "shared")}


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        ([], {"rows": {"a": {"tokenizer.model.code_dim": 8}}}, "one tokenizer for all rows"),
        ([], {"rows": {"a": {"data.size": 32}}}, "one set of images for all rows"),
        ([], {"rows": {"shared": {}}}, "is the folder of the tokenizer that all rows share"),
        ([], {"metrics": [{"name": "fd"}]}, "study.metrics: unknown 'tokenizer'; known are real, diffusion"),
        ([], {"curve": {"stage": "autoregressive", "score": "fd"}}, "set study.curve.stage=diffusion"),
        ([], {"curve": {"stage": "diffusion"}}, "is a key of the tokenizer's log, not of diffusion's"),
        (["--diffusion.model.label_dropout=0"], {}, "samples of diffusion: diffusion.sample.guidance=1.5 compares"),
        (["--diffusion.sample.guide=step-12"], {}, "guide=step-12, but there is no snapshot of step 12, nor will"),
        (["--diffusion=null", "--eval.variants={}"], {}, "no section autoregressive or diffusion to train"),
        (["--eval.snapshots=false"], {}, r"study.curve.score=fd is taken of snapshots: set eval.snapshots=true"),
        (["--diffusion.train.snapshot_every=0"], {}, "diffusion.train.snapshot_every above 0"),
        (["--eval.variants={cfg3: {diffusion.sample.guidance: 3}}"], {}, "'diffusion@cfg2'; did you mean 'diffusion@c"),
        (["--eval.variants={cfg2: {diffusion.sample.guidanc: 3}}"], {}, "did you mean 'diffusion.sample.guidance'"),
        (["--run.tokenizer=x"], {"stages": "tokenizer", "rows": {"a": {}}}, "this study trains tokenizers"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, words: list[str], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tell(*loaded(tmp_path, *words, **changes))


# What sampling costs


def test_passes_count_guidance_solvers_variants_and_snapshots(tmp_path: Path) -> None:
    _, base = loaded(tmp_path)
    assert base.diffusion is not None
    assert passes_per_sample(base.diffusion) == 3 * 2  # steps, with and without the label
    # The model, its variant, and snapshots after 8 and 16 of 20 steps: that of the last step is the model.
    assert sample_passes(base) == {"diffusion": 20 * (6 + 6 + 2 * 6)}
    words = ["--diffusion.sample.solver=heun", "--diffusion.sample.guidance=1", "--eval.variants={}"]
    _, base = loaded(tmp_path, *words, "--eval.snapshots=false")
    assert sample_passes(base) == {"diffusion": 20 * (2 * 3 - 1)}


def test_a_dry_run_tells_what_sampling_costs_apart_from_training(tmp_path: Path) -> None:
    told = tell(*loaded(tmp_path))
    assert "sampling per run" in told and "before it one tokenizer for all rows, 4 steps" in told
    assert "sampling for the scores, forward passes alone" in told and "2 rows x 2 seeds (0, 1) = 4 runs" in told


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


def test_a_small_study_runs_from_the_tokenizer_to_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study_jobs, "PROGRAM", REAL_PROGRAM)
    there = {name: getattr(subprocess, name) for name in ("STDOUT", "DEVNULL")}
    monkeypatch.setattr(study_jobs, "subprocess", SimpleNamespace(Popen=Inside, **there))
    loaded(tmp_path)
    words = ["study", "--config", str(tmp_path / "study.yaml"), f"--run.root={tmp_path / 'runs'}", "--study.seeds=[0]"]
    main(words)
    results = json.loads((tmp_path / "runs" / "small" / "results.json").read_text())
    for row in results["rows"].values():
        assert set(row["runs"]["0"]["scores"]) == {"diffusion/fd", "diffusion@cfg2/fd"}
        assert list(row["curve"]) == ["8", "16", "20"]
        assert row["curve"]["20"]["value"] == row["runs"]["0"]["scores"]["diffusion/fd"]
    main(words)
    assert "One seed, 0, hence no intervals" in (tmp_path / "runs" / "small" / "results.md").read_text()
    assert "2 runs, 2 done before" in capsys.readouterr().out
