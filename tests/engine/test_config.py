from dataclasses import dataclass, field
from pathlib import Path

import pytest

from engine import config
from engine.config import DataConfig, RunConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A small experiment."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    second: TrainConfig | None = None


def write(folder: Path, text: str, name: str = "a.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_files_are_merged_in_order_and_overrides_win(tmp_path: Path) -> None:
    first = write(tmp_path, "train: {steps: 7, learning_rate: 1e-4}\nsecond: {batch_size: 4}")
    second = write(tmp_path, "train: {steps: 8}", "b.yaml")
    trial = config.load(Trial, ["--config", first, "--config", second, "--second.steps=9", "--run.name", "x"])
    assert (trial.train.steps, trial.train.learning_rate) == (8, 1e-4)
    assert trial.second is not None and (trial.second.steps, trial.second.batch_size) == (9, 4)
    assert trial.run.folder == Path("runs/x")


def test_widths_are_a_list_on_the_command_line(tmp_path: Path) -> None:
    trial = config.load(Trial, ["--train.ema_widths=[0.05,0.1]", "--train.snapshot_every=500"])
    assert trial.train.ema_widths == (0.05, 0.1)
    assert config.load(Trial, ["--config", write(tmp_path, config.to_yaml(trial))]) == trial


def test_dotted_keys_change_a_configuration_as_strictly_as_a_file() -> None:
    trial = config.load(Trial, ["--train.steps=7"])
    other = config.changed(trial, {"train.learning_rate": 0.5, "second.batch_size": 4}, "there")
    assert (other.train.steps, other.train.learning_rate, trial.train.learning_rate) == (7, 0.5, 1e-3)
    assert other.second is not None and other.second.batch_size == 4 and trial.second is None
    for values, message in (
        ({"train.stpes": 7}, r"unknown key 'train\.stpes' in there: did you mean 'train\.steps'"),
        ({"train.steps": "many"}, r"there: .*steps.*many"),
        ({"train.ema": 2.0}, r"there: .*train\.ema=2\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            config.changed(trial, values, "there")


def test_a_tokenizer_of_another_run_lies_in_its_folder() -> None:
    assert RunConfig(name="a").tokenizer_folder == Path("runs/a")
    assert RunConfig(name="a", tokenizer="runs/b").tokenizer_folder == Path("runs/b")


def test_an_absent_section_stays_absent() -> None:
    assert config.load(Trial, []).second is None


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    trial = config.load(Trial, ["--second.betas=[0.5,0.6]", "--data.path=somewhere", "--train.learning_rate=3e-5"])
    assert config.load(Trial, ["--config", write(tmp_path, config.to_yaml(trial))]) == trial


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("train: {stpes: 7}", [], r"unknown key 'train\.stpes' in .*a\.yaml: did you mean 'train\.steps'"),
        ("second: {stpes: 7}", [], r"unknown key 'second\.stpes' .* did you mean 'second\.steps'"),
        ("run: {seed: 1}", ["--train.stpes=3"], r"unknown key 'train\.stpes' in the command line"),
        ("run: {seed: 1}", ["--train.steps=many"], r"train\.steps.*many"),
        ("train: {ema_widths: [0.05, 0.1]}", [], r"train\.ema_widths=\[0\.05, 0\.1\] .*set train\.snapshot_every"),
        ("train: {ema_widths: [0.3], snapshot_every: 5}", [], r"ema_widths=\[0\.3\] must lie between 0 and 0\.28"),
        ("train: {ema_widths: [0.1, 0.1], snapshot_every: 5}", [], r"ema_widths=\[0\.1, 0\.1\] .* differ"),
        ("train: {snapshot_every: -1}", [], r"train\.snapshot_every=-1 must not be negative"),
        ("run: {seed: 1}", ["--second.decay=sideways"], r"decay.*cosine.*sideways"),
        ("train: {ema: 2}", [], r"train\.ema=2.*\[0, 1\)"),
        ("run: {seed: 1}", ["--second.steps=0"], r"train\.steps=0 must be at least 1"),
        ("- a list", [], "expected sections"),
        ("", [], "expected sections"),
        ("run: {name: [", [], "not valid YAML"),
    ],
)
def test_a_mistake_is_an_error_that_names_key_and_value(
    tmp_path: Path, text: str, arguments: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config.load(Trial, ["--config", write(tmp_path, text), *arguments])


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ValueError, match=r"nowhere\.yaml: no such file"):
        config.load(Trial, ["--config=nowhere.yaml"])


def test_differences_are_told_by_dotted_key() -> None:
    old, new = config.to_dict(Trial()), config.to_dict(Trial(train=TrainConfig(steps=3)))
    assert config.difference(old, new) == {"train.steps": (1000, 3)}
