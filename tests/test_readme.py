"""What the README tells a user to type exists and is understood."""

import re
import shlex
from pathlib import Path

import pytest

from tokenloom.cli import COMMANDS
from tokenloom.experiment import load_experiment
from tokenloom.study_config import load_study

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
OWN_OPTIONS = {"--only": 1, "--num": 1, "--label": 1, "--seed": 1, "--out": 1, "--decoder": 1, "--dry-run": 0}
OWN_OPTIONS |= {"--seeds": 1, "--report-only": 0, "--acceptance": 1, "--stream": 0, "--npz": 1}
OWN_OPTIONS |= {"--prompt": 1, "--image": 1}


def commands() -> list[list[str]]:
    """Every tokenloom command of the README and of the headers of configs/, as words after `tokenloom`."""
    texts = [path.read_text() for path in (ROOT / "configs").glob("*.yaml")]
    headers = [re.split(r"^\w", text, maxsplit=1, flags=re.M)[0].replace("\n#", "\n") for text in texts]
    text = "\n".join([README, *headers]).replace("\\\n", " ")
    before = r"^\s*(?:\w+=\S+ )?(?:torchrun .* -m |\.venv/bin/)?"
    return [shlex.split(line) for line in re.findall(before + r"tokenloom (\w+.*--config .*)$", text, flags=re.M)]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_with_a_configuration_is_understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command, rest = words[0], words[1:]
    assert command in COMMANDS
    for option, values in OWN_OPTIONS.items():
        while option in rest:
            place = rest.index(option)
            del rest[place : place + 1 + values]
    if "..." not in rest:
        (load_study if command == "study" else load_experiment)(rest)


def test_the_readme_has_such_commands() -> None:
    assert len(commands()) >= 6


def test_every_command_is_in_the_table() -> None:
    for command in COMMANDS:
        assert f"`tokenloom {command}" in README


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"`((?:configs|engine|tokenizer|generator|eval|tokenloom)/[\w/]+\.(?:py|yaml))`", README):
        assert (ROOT / name).is_file(), name
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


def test_make_targets_that_the_texts_name_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        assert set(re.findall(r"^ {4}make (\w+)", text, flags=re.M)) <= targets
