"""Where the files of a run are looked for."""

from pathlib import Path

import pytest
import yaml

from tokenloom.run_files import tokenizer_folder


def make(folder: Path, **run: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"run": run}))
    return folder


def test_a_tokenizer_is_found_from_any_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names in a configuration count from where the run was started."""
    lender = make(tmp_path / "work" / "runs" / "a")
    run = make(tmp_path / "work" / "runs" / "b", root="runs", name="b", tokenizer="runs/a")
    for place, given in ((tmp_path, run), (tmp_path / "work", Path("runs/b")), (run, Path())):
        monkeypatch.chdir(place)
        assert tokenizer_folder(given).resolve() == lender
    moved = make(tmp_path / "else" / "c", root="runs", name="b", tokenizer="runs/a")
    assert tokenizer_folder(moved) == Path("runs/a")  # it does not tell where it was started
    far = make(tmp_path / "work" / "runs" / "d", root=str(tmp_path / "work" / "runs"), name="d", tokenizer=str(lender))
    assert tokenizer_folder(far) == lender
    (far / "tokenizer").mkdir()
    assert tokenizer_folder(far) == far
