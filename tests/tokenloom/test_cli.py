import json
import subprocess
import sys
from pathlib import Path

import pytest

from tokenloom.cli import COMMANDS, USAGE, main

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
from untrained import make_run, write_yaml

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke.yaml")


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2
    return capsys.readouterr().err


def test_help_lists_every_command_and_loads_nothing_heavy() -> None:
    for command in COMMANDS:
        assert f"\n  {command} " in USAGE
    program = "import sys; from tokenloom.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_a_commands_help_lists_its_options_and_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["sample", "--help"])
    assert error.value.code == 0
    told = capsys.readouterr().out
    for word in ("--label", "--dry-run", "--tokenizer.model.code_dim", "--diffusion", "Codes in the codebook"):
        assert word in told


@pytest.mark.parametrize("words", [["eval", "--help"], ["eval", "--generated=a", "--help"]])
def test_the_help_of_eval_tells_how_any_images_are_scored(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(words)
    told = capsys.readouterr().out
    assert error.value.code == 0 and "--reference" in told and "--eval.convention" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command 'trian'"),
        (["run"], "add --config FILE"),
        (["run", "--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["run", "--config", SMOKE, "--tokenizer.model.codedim=3"], "did you mean 'tokenizer.model.code_dim'"),
        (["run", "--config", SMOKE, "--autoregressive.train.stesp=3"], "did you mean 'autoregressive.train.steps'"),
        (["run", "--config", SMOKE, "--tokenizer.model.patch_size=7"], "multiple of the patch size"),
        (["generator", "--config", SMOKE, "--diffusion=null", "--only", "diffusion"], "has autoregressive"),
        (["sample", "--config", SMOKE, "--only", "gan"], "invalid choice: 'gan'"),
        (["sample", "--config", SMOKE, "--stream"], "add --only autoregressive"),
        (["sample", "--config", SMOKE, "--npz", "all.zip"], "--npz all.zip: the file must end in .npz"),
        (["eval", "--generated", "nowhere"], "give --generated A --reference B to score images"),
        (["eval", "--generated=nowhere", "--reference=nowhere", "--eval.features=[random]"], "nowhere: no such file"),
        (["eval", "--reference=a", "--statistics=b.npz", "--eval.fetures=[random]"], "did you mean 'eval.features'"),
        (["run", "--config", SMOKE, "--eval.features=[random,random]"], "names a judge twice"),
        (["run", "--config", SMOKE, "--eval.convention=torch_fidelity"], "too few for eval.convention=torch_fidelity"),
        (["sample", "--config", SMOKE, "--acceptance", "1.5"], "--acceptance=1.5 must lie between 0 and 1"),
        (["run", "--config", SMOKE, "--eval.rejection.acceptances=[0]"], "acceptances=0.0 must lie between 0 and 1"),
        (["run", "--config", SMOKE, "--data.source=folder", "--data.path=nowhere"], "nowhere"),
        (["run", "--config", SMOKE, "--eval.num_samples=5000"], "set --eval.num_samples="),
        (["run", "--config", SMOKE, "--eval.features=[inception]", "--eval.inception_weights=no.pth"], "no.pth"),
        (["run", "--config", SMOKE, "--autoregressive.train.accumulate=3"], "batch_size=32 must be a multiple"),
        (["run", "--config", SMOKE, "--diffusion.model.patch_size=3"], "patch"),
        (["run", "--config", SMOKE, "--diffusion.model.label_dropout=0"], "diffusion.sample.guidance=1.5"),
        (["run", "--config", SMOKE, "--eval.lpips=vgg"], "vgg16"),
        (["run", "--config", SMOKE, "--eval.features=[foo]"], "foo"),
        (["run", "--config", SMOKE, "--tokenizer.train.clip_norm=-1"], "train.clip_norm=-1.0 must not be negative"),
        (["run", "--config", SMOKE, "--diffusion.train.learning_rate=0"], "train.learning_rate=0.0 must be above 0"),
        (["compare", "nowhere.json", "nowhere.json"], "nowhere.json"),
    ],
)
def test_a_mistake_ends_with_one_clear_message(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = fails(words, capsys)
    assert message in told
    assert "Traceback" not in told
    assert not (tmp_path / "runs").exists()  # told before anything was trained


@pytest.fixture
def run(tmp_path: Path) -> list[str]:
    """What points a command at a run of untrained models."""
    make_run(tmp_path)
    return ["--config", str(write_yaml(tmp_path / "trial.yaml")), f"--run.root={tmp_path}"]


def test_the_best_samples_are_drawn_and_told(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", *run, "--only", "autoregressive", "--num", "6", "--label", "3"]
    picks = ["--eval.rejection.classifier.train.steps=2", "--eval.rejection.classifier.widths=[8,8,8]"]
    main([*words, "--acceptance", "0.5", *picks])
    folder = tmp_path / "digits" / "samples" / "autoregressive-seed0-num6-label3-accept0.5"
    assert f"the best 0.5 of all candidates, in {folder}" in capsys.readouterr().out
    told = json.loads((folder / "samples.json").read_text())
    assert (told["acceptance"], told["candidates"], told["labels"]) == (0.5, 12, [3] * 6)
    assert len(told["probability"]) == len(list(folder.glob("0*.png"))) == 6 and (folder / "grid.png").exists()
    assert [each.name for each in folder.parent.iterdir()] == [folder.name]  # the candidates are gone
    main([*words, "--acceptance", "0.5", *picks])
    assert [each.name for each in folder.parent.iterdir()] == [folder.name]


def test_samples_can_be_watched_and_are_the_same(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", *run, "--only", "autoregressive", "--num", "4"]
    main([*words, "--out", str(tmp_path / "plain")])
    main([*words, "--out", str(tmp_path / "watched"), "--stream"])
    assert f"images on the way: {tmp_path / 'watched' / 'autoregressive-partial.png'}" in capsys.readouterr().out
    plain, watched = (tmp_path / name / "autoregressive" for name in ("plain", "watched"))
    assert all((plain / f"{row:06d}.png").read_bytes() == (watched / f"{row:06d}.png").read_bytes() for row in range(4))
    assert [each.name for each in watched.parent.iterdir()] == ["autoregressive"]


def test_samples_as_one_array_are_scored_and_compared(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in ("0", "1"):
        main(["sample", *run, "--only=diffusion", "--num=20", "--seed", seed, "--npz", f"model.v{seed}.npz"])
    words = ["--reference=model.v0.npz", "--eval.features=[random]", "--run.device=cpu", f"--run.root={tmp_path}"]
    for seed in ("0", "1"):
        main(["eval", f"--generated=model.v{seed}.npz", *words])
        assert f"scores: model.v{seed}-scores.json; set them beside others" in capsys.readouterr().out
    main(["compare", "model.v0-scores.json", "model.v1-scores.json", "--only=fd_random"])
    told = capsys.readouterr().out
    assert "model.v0" in told and "model.v1" in told


def test_a_stage_before_its_time_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--config", SMOKE, f"--run.root={tmp_path}"]
    for command in ("encode", "generator", "sample", "eval"):
        assert "has not been trained to its end" in fails([command, *place], capsys)


def test_the_configuration_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--config", SMOKE, "--print_config", "--run.seed=17"])
    assert "seed: 17" in capsys.readouterr().out


def test_doctor_answers(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    assert "torch" in capsys.readouterr().out
