"""Every system's own configuration on the digits, shrunk, from images to scores."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tokenloom.cli import main
from tokenloom.experiment import Experiment, load_experiment

CONFIGS = Path(__file__).parents[2] / "configs"
SHORT = {"steps": 3, "warmup_steps": 0, "batch_size": 8, "preview_every": 0, "checkpoint_every": 3, "log_every": 1}
TOWER = {"blocks": 1, "width": 16, "heads": 2, "mlp": 32}
SMALL = {"depth": 1, "width": 16, "heads": 2}
EVAL = {"features": ["random"], "num_samples": 30, "neighbours": 0, "probe.taps": ["pixels"], "probe.num_train": 100}
CHANGED: dict[str, dict[str, Any]] = {
    "aligned": {
        "diffusion.align": {
            "num_images": 8,
            "num_steps": 3,
            "subdivisions": 1,
            "probe_images": 20,
            "candidates": 3,
            "max_sweeps": 2,
        }
    },
    "consistency": {},
    "super-resolution": {"diffusion.schedule.learned.hidden": 4, "diffusion.schedule.learned.channels": 4},
    "text": {},
}


def shrunk(name: str, root: Path) -> list[str]:
    """The words of a command that runs a configuration in seconds."""
    path = str(CONFIGS / f"{name}.yaml")
    experiment = load_experiment(["--config", path])
    values: dict[str, Any] = {"run.root": str(root), "run.device": "cpu", "run.precision": "fp32", "run.threads": 1}
    values |= {f"eval.{key}": value for key, value in EVAL.items()} | CHANGED[name] | shrunk_tokenizer(experiment)
    for family, _ in experiment.generators():
        values |= {f"{family}.model.{key}": value for key, value in SMALL.items()}
        values |= {f"{family}.train.{key}": value for key, value in SHORT.items()}
    if experiment.diffusion:
        values["diffusion.sample.num_steps"] = min(3, experiment.diffusion.sample.num_steps)
    given = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return ["--config", path, *(f"--{key}={value}" for key, value in given.items())]


def shrunk_tokenizer(experiment: Experiment) -> dict[str, Any]:
    views = {"tokenizer.views": 1}
    if experiment.tokenizer.model.architecture == "pixels":
        return views
    values = {f"tokenizer.train.{key}": value for key, value in SHORT.items()}
    return views | values | {"tokenizer.model.encoder": TOWER, "tokenizer.model.decoder": TOWER}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("systems")


def records(folder: Path) -> set[tuple[str, str]]:
    return {(each["subject"], each["name"]) for each in json.loads((folder / "eval" / "metrics.json").read_text())}


@pytest.mark.parametrize("name", CHANGED)
def test_a_system_runs_from_images_to_scores(name: str, root: Path) -> None:
    words = shrunk(name, root)
    main(["run", *words])
    folder, experiment = root / name, load_experiment(words)
    assert (folder / "report.html").stat().st_size > 10_000
    subjects = [family for family, _ in experiment.generators()]
    subjects += [f"diffusion@{variant}" for variant in experiment.eval.variants]
    assert {(subject, "fd_random") for subject in subjects} <= records(folder)
    told = json.loads((folder / "samples" / "diffusion" / "samples.json").read_text())
    if name == "text":
        assert experiment.diffusion is not None
        held_out = [template.replace("{}", "") for template in experiment.diffusion.condition.text.held_out]
        assert all(any(text.replace(word, "") in held_out for word in text.split()) for text in told["prompts"])
        sample = ["--prompt", "the number 7", "--num", "2", "--out", str(root / "asked")]
        main(["sample", *words, *sample])
        assert len(list((root / "asked").glob("*/0*.png"))) == 4
    if name == "super-resolution":
        assert {("diffusion", "psnr"), ("diffusion", "ssim"), ("enlarged", "psnr")} <= records(folder)
        small = root / "small.png"
        Image.new("RGB", (4, 4), (90, 90, 90)).save(small)
        main(["sample", *words, "--image", str(small), "--num", "1", "--out", str(root / "restored")])
        assert (root / "restored" / "diffusion" / "000000.png").is_file()
    if name == "aligned":
        steps = json.loads((folder / "diffusion" / "steps.json").read_text())
        assert [stage["num_steps"] for stage in steps["stages"]] == [3, 6]
        assert (folder / "diffusion" / "steps.png").is_file() and len(told["settings"]["levels"]) == 3


def test_every_system_on_the_digits_is_among_them() -> None:
    """All configurations of one experiment that go beyond the demo, which other tests run."""
    known = {"digits", "smoke", "pixels", "cifar10", "imagenet256", "robust"}
    found = {path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("study-")}
    assert found - known == set(CHANGED)
