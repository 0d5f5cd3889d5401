"""Snapshots on disk; what the loop puts into them is in test_loop.py."""

import contextlib
import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.snapshots import averaged_at, read_snapshot, snapshots, write_snapshot

WIDTHS = (0.05, 0.1)


def state(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, 2), value), "b": torch.tensor(5)}


def write(stage: Path, step: int, widths: tuple[float, ...] = WIDTHS, value: float | None = None) -> None:
    model = state(step if value is None else value)
    averages = {width: state(step * (1 - width)) for width in widths}
    write_snapshot(stage / "snapshots", step, updates=step, model=model, widths=averages)


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_what_is_written_is_found_by_step_and_width(tmp_path: Path) -> None:
    for step in (900, 1000, 50):
        write(tmp_path, step)
    assert list(snapshots(tmp_path)) == [50, 900, 1000]
    assert sorted(path.name for path in snapshots(tmp_path)[50].iterdir()) == [
        "model.safetensors", "snapshot.json", "width-0.05.safetensors", "width-0.1.safetensors",
    ]  # fmt: skip
    assert torch.equal(read_snapshot(tmp_path, 900)["a"], state(900)["a"])
    assert torch.equal(averaged_at(tmp_path, 900, 0.1)["a"], state(900 * (1 - 0.1))["a"])
    assert averaged_at(tmp_path, 1000, 0.08)["b"] == 5


def test_an_average_at_a_step_knows_nothing_of_later_ones(tmp_path: Path) -> None:
    for step in (100, 200):
        write(tmp_path, step)
    before = averaged_at(tmp_path, 200, 0.08)["a"]
    write(tmp_path, 300, value=1e9)
    assert torch.equal(averaged_at(tmp_path, 200, 0.08)["a"], before)


def test_a_snapshot_of_a_step_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 10)
    write(tmp_path, 10, value=7)
    assert read_snapshot(tmp_path, 10)["a"][0, 0] == 7


@pytest.mark.parametrize("size", [10, 100, 400])  # in the middle of the weights, of the manifest
def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path, size: int) -> None:
    write(tmp_path, 5)
    with room_for(size), pytest.raises(OSError, match=r"snapshot of step 10 not written .*are whole; free some"):
        write(tmp_path, 10)
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["step-00000005"]
    assert torch.equal(read_snapshot(tmp_path, 5)["a"], state(5)["a"])


@pytest.mark.parametrize("name", ["model.safetensors", "width-0.05.safetensors", "snapshot.json"])
def test_a_cut_file_is_told(tmp_path: Path, name: str) -> None:
    write(tmp_path, 5)
    write(tmp_path, 10)
    path = tmp_path / "snapshots" / "step-00000005" / name
    path.write_bytes(path.read_bytes()[:-9])
    for read in (lambda: read_snapshot(tmp_path, 5), lambda: averaged_at(tmp_path, 10, 0.08)):
        with pytest.raises(ValueError, match=rf"step-00000005 is damaged \({name} .*delete it"):
            read()
    assert torch.equal(read_snapshot(tmp_path, 10)["a"], state(10)["a"])


def test_what_is_not_there_is_told_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no snapshot of step 5: train with train\.snapshot_every"):
        read_snapshot(tmp_path, 5)
    for step in (10, 20):
        write(tmp_path, step, widths=())
    for read in (lambda: read_snapshot(tmp_path, 15), lambda: averaged_at(tmp_path, 15, 0.08)):
        with pytest.raises(ValueError, match="no snapshot of step 15: there are those of steps 10, 20"):
            read()
    with pytest.raises(ValueError, match=r"no averages to reconstruct width 0\.08 from: train with train\.ema_widths"):
        averaged_at(tmp_path, 20, 0.08)


def test_a_width_that_the_snapshots_cannot_tell_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 10)
    with pytest.raises(ValueError, match=r"width 0\.2 at step 10 .* 1 snapshots of widths 0\.05, 0\.1: \d+% of"):
        averaged_at(tmp_path, 10, 0.2)


def test_a_snapshot_before_the_first_good_step_has_no_part_in_averages(tmp_path: Path) -> None:
    averages = {width: state(0.0) for width in WIDTHS}
    write_snapshot(tmp_path / "snapshots", 1, updates=0, model=state(0.0), widths=averages)
    write(tmp_path, 10)
    assert averaged_at(tmp_path, 10, 0.08)["a"].isfinite().all()
    told = json.loads((tmp_path / "snapshots" / "step-00000001" / "snapshot.json").read_text())
    assert (told["step"], told["updates"], told["widths"]) == (1, 0, list(WIDTHS))
