"""Rows that sample with another row's network: `row:<name>` in the place of its folder."""

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from engine.config import changed
from generator.config import CurriculumConfig, DiffusionConfig, DiffusionSampleConfig
from tokenloom import study_jobs
from tokenloom.experiment import Experiment
from tokenloom.study import check_samples, run_study, tell
from tokenloom.study_config import StudyConfig, load_study
from tokenloom.study_jobs import carry_out, changed_settings, finished
from tokenloom.study_plan import Row, Run, plan_rows, plan_runs
from tokenloom.study_taken import check_taken, taken_by, with_taken, without_taken

SINGLE = {"diffusion.curriculum.kind": "single", "diffusion.curriculum.num_clusters": 2}
COPY = {**SINGLE, "diffusion.curriculum.cluster": 1, "diffusion.sample.outside": "row:full"}
GUIDED = {
    "diffusion.sample.guide": "row:weak", "diffusion.sample.guidance": 2, "diffusion.model.label_dropout": 0,
    "eval.variants": {"cfg3": {"diffusion.sample.guidance": 3}},
}  # fmt: skip
ROWS: dict[str, Any] = {"copy": COPY, "guided": GUIDED, "weak": {"diffusion.path": "gvp"}, "full": {}}
CONTENT: dict[str, Any] = {
    "study": {
        "title": "Small", "stages": "generator", "seeds": [0, 1], "budget": "steps", "baseline": "full", "rows": ROWS,
        "metrics": [{"name": "fd", "subject": "diffusion", "better": "lower"}],
        "curve": {"stage": "diffusion", "metric": "loss"},
    },
    "data": {"source": "digits", "size": 16},
    "tokenizer": {"model": {"architecture": "pixels"}},
    "diffusion": {"model": {"depth": 1, "width": 16, "heads": 2, "patch_size": 4}, "train": {"steps": 20}},
    "eval": {"features": ["random"]},
}  # fmt: skip


def loaded(folder: Path, **changes: Any) -> tuple[StudyConfig, Experiment]:
    (folder / "study.yaml").write_text(yaml.safe_dump({**CONTENT, "study": {**CONTENT["study"], **changes}}))
    return load_study(["--config", str(folder / "study.yaml"), f"--run.root={folder}", "--run.name=small"])


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyConfig, Experiment, list[Row]]:
    study, base = loaded(tmp_path_factory.mktemp("planned"))
    return study, base, plan_rows(study, base)


class Pretended:
    """In the place of a process: leaves at once what a command would leave, and fails for the rows in `failing`."""

    calls: list[str]
    failing: set[str]

    def __init__(self, words: Sequence[str], **_: Any) -> None:
        command, config = words[3], yaml.safe_load(Path(words[5]).read_text())
        folder = Path(config["run"]["root"]) / config["run"]["name"]
        row, self.code = folder.parent.name, 0
        self.calls.append(f"{command} {row} {folder.name}")
        if row in self.failing:
            self.code = 1
        elif command == "eval":
            sample = config["diffusion"]["sample"]
            for taken in (sample["guide"], sample["outside"]):
                assert taken is None or Path(taken, "diffusion", "model.json").exists()
            write(folder / "eval" / "metrics.json", [
                {"name": "fd_random", "subject": "diffusion", "value": 1.0, "interval": None, "n": 20, "protocol": {}}
            ])  # fmt: skip
        else:
            stage = {"tokenizer": "tokenizer", "generator": "diffusion"}.get(command, "codes/train")
            name = "meta.json" if command == "encode" else "model.json"
            write(folder / stage / name, {"fingerprint": f"{row} of {folder.name}"})

    def poll(self) -> int:
        return self.code


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that were carried out, with row and seed."""
    there = {name: getattr(subprocess, name) for name in ("STDOUT", "DEVNULL")}
    Pretended.calls, Pretended.failing = [], set()
    monkeypatch.setattr(study_jobs, "subprocess", SimpleNamespace(Popen=Pretended, **there))
    monkeypatch.setattr(study_jobs, "GLANCE", 0.001)
    return Pretended.calls


Runs = Callable[..., list[Run]]


@pytest.fixture
def runs(planned: tuple[StudyConfig, Experiment, list[Row]], tmp_path: Path) -> Runs:
    """The study's runs under some seeds, in a folder of this test."""
    study, base, rows = planned

    def planned_in(*seeds: int, name: str = "small") -> list[Run]:
        run = dataclasses.replace(base.run, root=str(tmp_path), name=name)
        return plan_runs(study, rows, seeds or [0], run)

    return planned_in


def carry(runs: Sequence[Run], *, jobs: int = 1) -> dict[str, str]:
    return carry_out(runs, stages="generator", jobs=jobs, title="Small")


@pytest.mark.parametrize("jobs", [1, 3])
def test_networks_are_trained_before_they_are_taken(runs: Runs, calls: list[str], jobs: int) -> None:
    assert not carry(runs(0, 1), jobs=jobs)
    assert len(calls) == 2 * 4 * 2
    for seed in (0, 1):
        for taker, provider in (("copy", "full"), ("guided", "weak")):
            assert calls.index(f"eval {provider} seed-{seed}") < calls.index(f"generator {taker} seed-{seed}")
    copy = next(run for run in runs(1) if run.row == "copy")
    config = yaml.safe_load((copy.folder / "config.yaml").read_text())
    assert config["diffusion"]["sample"]["outside"] == str(copy.folder.parents[1] / "full" / "seed-1")
    count = len(calls)
    assert not carry(runs(0, 1)) and len(calls) == count


def test_a_network_that_failed_is_not_taken(runs: Runs, calls: list[str]) -> None:
    Pretended.failing = {"full"}
    problems = carry(runs())
    assert list(problems) == ["full seed 0", "copy seed 0"]
    assert problems["copy seed 0"] == "not begun: it takes the network of full seed 0, which is not finished"
    assert not any("copy" in call for call in calls) and "eval guided seed-0" in calls
    Pretended.failing = set()
    assert not carry(runs())


def test_a_moved_study_is_finished_and_another_network_makes_other_results(
    runs: Runs, calls: list[str], tmp_path: Path
) -> None:
    carry(runs())
    shutil.move(tmp_path / "small", tmp_path / "moved")
    moved = {run.row: run for run in runs(name="moved")}
    assert all(map(finished, moved.values()))
    write(moved["full"].folder / "diffusion" / "model.json", {"fingerprint": "another"})
    assert finished(moved["full"]) and not finished(moved["copy"])
    assert changed_settings(moved["copy"]) == ["diffusion.sample.outside.fingerprint"]


def test_rows_follow_a_network_that_is_trained_anew(runs: Runs, calls: list[str]) -> None:
    """A row that stands by its old network, whose training is to come, is looked at again after it."""
    carry(runs())
    folders = {run.row: run.folder for run in runs()}
    for fingerprint, followed in ((None, []), ("older", ["generator copy seed-0", "eval copy seed-0"])):
        (folders["full"] / "study.json").unlink()
        if fingerprint:
            told = json.loads((folders["copy"] / "study.json").read_text())
            told["settings"]["diffusion"]["sample"]["outside"]["fingerprint"] = fingerprint
            write(folders["copy"] / "study.json", told)
        calls.clear()
        assert not carry(runs())
        assert calls == ["generator full seed-0", "eval full seed-0", *followed]


def test_only_takes_its_networks_along(tmp_path: Path, calls: list[str]) -> None:
    study, base = loaded(tmp_path, rows={name: ROWS[name] for name in ("copy", "weak", "full")})
    assert not run_study(study, base, only=["copy"], seeds=[1]).problems
    assert {call.split(maxsplit=1)[1] for call in calls} == {"small shared", "full seed-1", "copy seed-1"}
    kept = yaml.safe_load((base.run.folder / "study.yaml").read_text())
    assert kept["study"]["rows"]["copy"]["diffusion.sample.outside"] == "row:full"


def test_a_dry_run_tells_which_row_comes_first(tmp_path: Path) -> None:
    told = tell(*loaded(tmp_path, rows={name: ROWS[name] for name in ("copy", "weak", "full")}), only=["copy"])
    assert "2 rows x 2 seeds (0, 1) = 4 runs, 4 not done" in told and "outside=row:full" in told
    assert "curriculum.kind=single, num_clusters=2" in told
    assert "full comes first: its network is taken in the sampling of copy" in told


def test_samples_are_checked_without_the_networks_to_come(planned: tuple[StudyConfig, Experiment, list[Row]]) -> None:
    """Guided by another network, samples need no null label, in variants neither; other mistakes are still found."""
    study, _, rows = planned
    check_samples(study, rows)
    guided = next(row for row in rows if row.name == "guided")
    plain = without_taken(guided.experiment)
    assert plain.diffusion is not None and plain.diffusion.sample.guide is None
    assert taken_by(guided.experiment) == {"guide": "weak"} and not taken_by(plain)
    assert plain.eval.variants == {"cfg3": {"diffusion.sample.guidance": 1.0}}
    wrong = changed(guided.experiment, {"diffusion.sample.snapshot": 7}, "here")
    with pytest.raises(ValueError, match="there is no snapshot of step 7"):
        check_samples(study, [dataclasses.replace(guided, experiment=wrong)])


def test_networks_that_networks_take_count_too() -> None:
    taken = {"a": {"guide": "b"}, "b": {"outside": "c"}, "c": {}, "d": {"guide": "c"}}
    assert with_taken(["a"], taken) == {"a", "b", "c"}
    assert with_taken(["d", "c"], taken) == {"c", "d"}


def taking(**providers: str | None) -> dict[str, Experiment]:
    """Experiments by name of the row, each guided by another; None takes no network."""
    samples = {
        name: DiffusionSampleConfig(guide=provider and f"row:{provider}", guidance=2)
        for name, provider in providers.items()
    }
    return {name: Experiment(diffusion=DiffusionConfig(sample=sample)) for name, sample in samples.items()}


def alone(outside: str) -> Experiment:
    """An experiment that trains one cluster alone."""
    curriculum, sample = CurriculumConfig(kind="single"), DiffusionSampleConfig(outside=outside)
    return Experiment(diffusion=DiffusionConfig(curriculum=curriculum, sample=sample))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            taking(full=None, copy="ful"),
            "study.rows.copy.diffusion.sample.guide=row:ful: unknown 'ful'; did you mean",
        ),
        (taking(full=None, copy="copy"), "guide=row:copy: copy would wait for itself"),
        (taking(a="b", b="c", c="a"), "study.rows.a.diffusion.sample.guide=row:b: a would wait for b, which needs a"),
        ({**taking(copy="codes"), "codes": Experiment()}, "the row codes trains no diffusion model"),
        ({"copy": alone("row:other"), "other": alone("runs/full")}, "the row other trains on one cluster alone"),
    ],
)
def test_a_network_that_cannot_be_taken_is_named(rows: dict[str, Experiment], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_taken(rows)


def test_a_network_of_another_tokenizer_cannot_be_taken(tmp_path: Path) -> None:
    study, base = loaded(tmp_path, stages="all", rows={"copy": COPY, "full": {}})
    with pytest.raises(ValueError, match=r"study.rows.copy.diffusion.sample.outside=row:full: .* set it to generator"):
        plan_rows(study, base)
