"""`tokenloom steps`: from a trained model to its steps, their picture, and samples and scores that take them."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from engine.device import setup
from eval.distances import frechet
from eval.statistics import Moments
from tokenizer.model import load_tokenizer
from tokenloom import pipeline
from tokenloom.cli import main
from tokenloom.experiment import Experiment, load_experiment
from tokenloom.export import export
from tokenloom.steps_judge import open_judge
from tokenloom.steps_plot import noises, steps_plot
from tokenloom.study_config import load_study

CONFIGS = Path(__file__).parents[2] / "configs"
TOWER = {"blocks": 1, "width": 16, "heads": 2, "mlp": 32}
TRAIN = {"steps": 3, "batch_size": 16, "preview_every": 0}
CONTENT: dict[str, Any] = {
    "run": {"name": "steps", "device": "cpu", "precision": "fp32", "threads": 1},
    "data": {"source": "digits", "size": 16},
    "tokenizer": {
        "model": {"patch_size": 4, "code_dim": 4, "vocab_size": 16, "encoder": TOWER, "decoder": TOWER},
        "train": TRAIN,
    },
    "diffusion": {
        "model": {"preset": "tiny", "depth": 1, "width": 16, "heads": 2}, "train": TRAIN,
        "align": {
            "num_images": 8, "num_steps": 3, "subdivisions": 1, "candidates": 3, "max_sweeps": 2, "probe_images": 20
        },
        "sample": {"num_steps": 3, "steps": "aligned"},
    },
    "eval": {"features": ["random"], "num_samples": 20, "probe": {"taps": ["pixels"], "c_grid": [1.0]}},
}  # fmt: skip


def written(root: Path, **diffusion: Any) -> list[str]:
    """Words that name a configuration; a key of None is left out."""
    section = {key: value for key, value in {**CONTENT["diffusion"], **diffusion}.items() if value is not None}
    path = root / "steps.yaml"
    path.write_text(yaml.safe_dump({**CONTENT, "diffusion": section}))
    return ["--config", str(path), f"--run.root={root}"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a run up to its diffusion model and the steps that follow at once."""
    root = tmp_path_factory.mktemp("steps")
    for command in ("tokenizer", "encode", "generator"):
        main([command, *written(root)])
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def steps_file(root: Path) -> Path:
    return root / "steps" / "diffusion" / "steps.json"


def experiment(root: Path, **diffusion: Any) -> Experiment:
    return load_experiment(written(root, **diffusion))


def test_the_section_optimises_after_training_and_draws_a_picture(trained: Path) -> None:
    told = json.loads(steps_file(trained).read_text())
    assert [stage["num_steps"] for stage in told["stages"]] == [3, 6] and told["distance"] == "fd_random"
    assert len(told["stages"][0]["distances"]) == len(told["stages"][0]["bounds"])
    with Image.open(steps_file(trained).with_suffix(".png")) as image:
        assert image.width > image.height > 300
    assert json.loads((trained / "steps" / "stages.json").read_text())["steps"]["seconds"] >= 0


def test_the_command_says_when_there_is_nothing_to_do(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = steps_file(root).stat().st_mtime_ns
    main(["steps", *written(root)])
    out = capsys.readouterr().out
    assert "steps: done before, nothing to do" in out and "--diffusion.sample.steps=aligned samples in them" in out
    assert steps_file(root).stat().st_mtime_ns == before


def test_without_the_section_only_the_command_optimises(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps_file(root).unlink()
    words = written(root, align=None, sample={"num_steps": 2})
    main(["generator", *words])
    assert not steps_file(root).exists()
    small = ["num_images=2", "num_steps=2", "subdivisions=0", "candidates=3", "max_sweeps=1", "probe_images=0"]
    main(["steps", *words, *(f"--diffusion.align.{each}" for each in small)])
    assert len(json.loads(steps_file(root).read_text())["stops"]) == 3
    with pytest.raises(SystemExit):
        main(["steps", *words, "--diffusion=null"])
    assert "this configuration has no section diffusion" in capsys.readouterr().err


def test_samples_and_scores_take_the_steps_and_follow_them(root: Path) -> None:
    config, device = experiment(root), setup(experiment(root).run)
    pipeline.draw_samples(config, device, "diffusion")
    samples = root / "steps" / "samples" / "diffusion" / "samples.json"
    stops = json.loads(steps_file(root).read_text())["stops"]
    levels = json.loads(samples.read_text())["settings"]["levels"]
    assert levels == stops[:-1:2]
    scored = pipeline._scored_as(config)
    assert scored["models"]["steps"] == stops
    told = json.loads(steps_file(root).read_text())
    steps_file(root).write_text(json.dumps({**told, "stops": [stop / 2 for stop in stops]}))
    pipeline.draw_samples(config, device, "diffusion")
    assert json.loads(samples.read_text())["settings"]["levels"] == [level / 2 for level in levels]
    assert pipeline._scored_as(config) != scored
    assert "steps" not in pipeline._scored_as(experiment(root, sample={"num_steps": 3}))["models"]


def test_steps_that_will_not_come_are_named_before_training(root: Path) -> None:
    without = experiment(root, align=None)
    pipeline.check(without, setup(without.run))  # they are there
    steps_file(root).unlink()
    pipeline.check(experiment(root), setup(without.run))
    with pytest.raises(ValueError, match=r"steps=aligned, but no steps will be optimised"):
        pipeline.check(without, setup(without.run))


def test_a_judge_that_cannot_be_had_is_named_before_training(root: Path) -> None:
    align = {**CONTENT["diffusion"]["align"], "probe_features": "timm:resnet18:nowhere.pt:64"}
    lacking = experiment(root, align=align)
    with pytest.raises(ValueError, match=r"diffusion\.align\.probe_features=timm:resnet18:nowhere\.pt:64: .*nowhere"):
        pipeline.check(lacking, setup(lacking.run))
    unprobed = {key: value for key, value in align.items() if key != "probe_features"} | {"probe_images": 0}
    pipeline.check(experiment(root, align=unprobed), setup(lacking.run))


def test_an_export_takes_the_steps_along(root: Path, tmp_path: Path) -> None:
    out = export(root / "steps", tmp_path / "out")
    assert (out / "diffusion" / "steps.json").read_bytes() == steps_file(root).read_bytes()


def test_the_judge_holds_decoded_latents_against_the_training_images(root: Path) -> None:
    config = experiment(root)
    judge, tokenizer = open_judge(config, setup(config.run)), load_tokenizer(root / "steps")
    latents = torch.randn(30, *tokenizer.latent_shape, generator=torch.Generator().manual_seed(0))
    features = judge.see(latents)
    assert judge.name == "fd_random" and features.shape == (30, 256)
    images = [batch["images"] for batch in _training_batches(config)]
    reference = Moments.of(torch.cat([judge.extractor(part) for part in images])).gaussian()
    expected = frechet(Moments.of(features).gaussian(), reference)
    assert judge.distance(features) == pytest.approx(expected, rel=1e-4)
    assert judge.distance(judge.extractor(torch.cat(images)).float()) < 1e-3 * expected


def _training_batches(config: Experiment) -> Any:
    from engine.sources import open_images

    return open_images(config.data, "train").in_order(500)


def test_the_picture_of_one_schedule_without_a_probe() -> None:
    stage = {"num_steps": 2, "stops": [-4.0, 0.0, 4.0], "sweeps": 1, "bounds": [2.0, 1.0], "distances": []}
    picture = steps_plot({"stages": [stage], "stops": stage["stops"], "distance": None})
    assert Image.open(io.BytesIO(picture)).format == "PNG"
    assert noises([0.0, 2.0]) == pytest.approx([1.0, 0.36787944])


def test_the_study_scores_every_solver_in_every_schedule_and_number_of_steps() -> None:
    study, base = load_study(["--config", str(CONFIGS / "study-steps.yaml")])
    assert base.diffusion is not None and base.diffusion.align is not None
    expected = {
        f"{name}-{kind}-{num}": {"solver": solver, "steps": steps, "num_steps": num}
        for name, solver in (("ddim", "ddim"), ("dpm", "dpmpp_2m"), ("sde", "sde_dpmpp_2m"))
        for kind, steps in (("uniform", "cosine"), ("karras", "karras"), ("loguniform", "logsnr"), ("aligned",) * 2)
        for num in (5, 10, 20, 40)
    }
    own = {"solver": "ddim", "steps": "cosine", "num_steps": 10}
    assert {each.subject.partition("@")[2] for each in study.metrics} == set(expected) == set(base.eval.variants)
    for name, values in base.eval.variants.items():
        assert own | {key.rpartition(".")[2]: value for key, value in values.items()} == expected[name], name
