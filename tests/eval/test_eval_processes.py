"""Two processes that judge together find what one finds, and write it once."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import forked
from untrained import EVAL, make_run, write_yaml

SETTINGS = ["--eval.features=[random]", "--eval.reference=all", "--eval.neighbours=2"]
TAPS = ["--eval.probe.taps=[pixels,tokenizer.patch]", "--eval.probe.knn_k=0"]


def execute(folder: Path, words: list[str], *, processes: int) -> None:
    (forked.run if processes == 1 else forked.run_two)("tokenloom.cli:main", words, told=folder / "told")


def records(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(entry["subject"], entry["name"]): entry for entry in json.loads(path.read_text())}


def assert_alike(one: Path, two: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Both files tell the same scores, to rounding, under the same protocols."""
    alone, both = records(one), records(two)
    assert list(both) == list(alone)
    for key, entry in alone.items():
        assert both[key]["protocol"] == entry["protocol"] and both[key]["n"] == entry["n"], key
        assert both[key]["value"] == pytest.approx(entry["value"], rel=1e-5, abs=1e-7), key
    return both


@pytest.mark.slow
def test_a_run_scored_by_two_processes_has_the_scores_of_one(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for number, folder in enumerate(folders):
        make_run(folder)
        config = write_yaml(folder / "trial.yaml", EVAL)
        words = ["eval", "--config", str(config), f"--run.root={folder}", *SETTINGS, *TAPS]
        execute(folder, words, processes=number + 1)
    found = assert_alike(*(folder / "digits" / "eval" / "metrics.json" for folder in folders))
    # 1,438 training images are three chunks; samples and reconstructions are one, so a process has nothing to do.
    assert {"fd_random", "copies", "nll", "psnr", "perplexity", "probe_top1"} <= {name for _, name in found}
    told = (folders[1] / "told-1").read_text()
    assert "left out" not in told and "subject" not in told  # the first process alone speaks


@pytest.mark.slow
def test_files_scored_by_two_processes_have_the_scores_of_one(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name, count in (("made", 40), ("others", 1100)):
        np.savez(tmp_path / f"{name}.npz", arr_0=random.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8))
    for number, name in enumerate(("one", "two")):
        folder = tmp_path / name
        folder.mkdir()
        places = [f"--run.root={folder}", f"--out={folder / 'scores.json'}", f"--statistics={folder / 'others.npz'}"]
        inputs = [f"--generated={tmp_path / 'made.npz'}", f"--reference={tmp_path / 'others.npz'}"]
        execute(
            folder, ["eval", *inputs, *places, *SETTINGS[::2], "--run.device=cpu", "--count=30"], processes=number + 1
        )
    assert {
        subject for subject, _ in assert_alike(tmp_path / "one" / "scores.json", tmp_path / "two" / "scores.json")
    } == {
        "made",
        "real",
    }
    assert (tmp_path / "one" / "others.npz").read_bytes() == (tmp_path / "two" / "others.npz").read_bytes()
    assert "made" not in (tmp_path / "two" / "told-1").read_text()
