import subprocess
import sys
from pathlib import Path

import pytest

from tokenloom.cli import COMMANDS, USAGE, main

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
