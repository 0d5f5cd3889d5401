import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from engine.batches import Batches
from engine.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from engine.config import TrainConfig
from engine.log import read_metrics
from engine.loop import _Trainer
from engine.snapshots import averaged_at, read_snapshot, snapshots
from engine.task import Task

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import forked
from toy import Denoise, Noise, flat, train_toy


def wait_for(condition: Callable[[], object], process: BaseProcess) -> None:
    deadline = time.monotonic() + 60
    while not condition() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)


def logged(folder: Path) -> list[dict]:
    """metrics.jsonl without the figures that are times."""
    return [{k: v for k, v in record.items() if k != "samples_per_second"} for record in read_metrics(folder)]


def kept(folder: Path) -> dict[str, bytes]:
    """All files of the snapshots."""
    files = sorted(path for path in (folder / "snapshots").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_killed_at_random_moments_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    expected, _ = train_toy(tmp_path / "whole", steps=60, dropout=0.2, snapshot_every=9)
    moments = random.Random(0)
    for _ in range(4):
        count = len(read_metrics(tmp_path / "killed"))
        settings = {"steps": 60, "dropout": 0.2, "pause": 0.02, "snapshot_every": 9}
        process = forked.start("toy:train_toy", tmp_path / "killed", told=tmp_path / "told", **settings)
        wait_for(lambda count=count: len(read_metrics(tmp_path / "killed")) > count, process)
        time.sleep(moments.random() * 0.2)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert 4 <= len(read_metrics(tmp_path / "killed")) < len(read_metrics(tmp_path / "whole"))
    actual, task = train_toy(tmp_path / "killed", steps=60, dropout=0.2, snapshot_every=9)
    assert actual == expected
    assert kept(tmp_path / "killed") == kept(tmp_path / "whole") and len(kept(tmp_path / "whole")) == 4 * 7
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    assert task.good == 60


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_says_so_and_resumes_exactly(tmp_path: Path, number: signal.Signals) -> None:
    expected, _ = train_toy(tmp_path / "whole", steps=50)
    settings = {"steps": 50, "pause": 0.05, "checkpoint_every": 1000}
    process = forked.start("toy:train_toy", tmp_path / "stopped", told=tmp_path / "told", **settings)
    wait_for(lambda: read_metrics(tmp_path / "stopped"), process)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    told = (tmp_path / "told").read_text()
    assert f"stopped by {number.name}" in told and "the same command resumes" in told
    assert len(checkpoints(tmp_path / "stopped" / "checkpoints")) == 1
    assert train_toy(tmp_path / "stopped", steps=50, checkpoint_every=1000)[0] == expected


def test_resuming_falls_back_past_damaged_checkpoints(tmp_path: Path) -> None:
    expected, _ = train_toy(tmp_path)
    newest = checkpoints(tmp_path / "checkpoints")[-1]
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    with pytest.warns(UserWarning, match="does not match its sha256"):
        assert train_toy(tmp_path)[0] == expected


def test_a_finished_run_returns_at_once_and_a_longer_one_goes_on(tmp_path: Path) -> None:
    first, _ = train_toy(tmp_path, steps=10)
    again, task = train_toy(tmp_path, steps=10)
    assert (again, task.seen) == (first, 0)
    _, task = train_toy(tmp_path, steps=14)
    assert task.seen == 4


def test_fewer_steps_than_were_trained_are_refused(tmp_path: Path) -> None:
    train_toy(tmp_path, steps=8)
    with pytest.raises(ValueError, match=r"has 8 steps behind it, train\.steps=4"):
        train_toy(tmp_path, steps=4)


def test_checkpoints_after_a_fall_back_are_kept_although_damaged_ones_had_higher_steps(tmp_path: Path) -> None:
    train_toy(tmp_path, steps=40)
    for path in checkpoints(tmp_path / "checkpoints")[-1:]:
        (path / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="is damaged"):
        _, task = train_toy(tmp_path, steps=37)
    assert task.seen == 2
    assert [int(p.name[5:]) for p in checkpoints(tmp_path / "checkpoints")] == [35, 37]


def test_a_changed_configuration_is_refused_with_a_readable_diff(tmp_path: Path) -> None:
    train_toy(tmp_path, steps=8)
    with pytest.raises(ValueError, match=r"train\.learning_rate: 0\.001 -> 0\.01"):
        train_toy(tmp_path, steps=8, learning_rate=0.01)


def test_accumulation_equals_the_whole_batch(tmp_path: Path) -> None:
    train_toy(tmp_path / "whole")
    train_toy(tmp_path / "parts", accumulate=4)
    assert torch.allclose(flat(tmp_path / "whole"), flat(tmp_path / "parts"), atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_vectors_are_told_of_as_means_over_all_steps_since_the_last_line(tmp_path: Path, accumulate: int) -> None:
    """The share of positive numbers in the batches of those steps, whole or in parts."""
    train_toy(tmp_path, steps=10, accumulate=accumulate)
    lines = [record for record in logged(tmp_path) if "loss" in record]
    batches = Batches(Noise(), batch_size=16, seed=0)
    positive = [(batches.batch(step)["rows"] > 0).double().mean().item() for step in range(10)]
    for line, steps in zip(lines, ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9]), strict=True):
        share = sum(positive[step] for step in steps) / len(steps)
        assert (line["step"], line["before"]) == (steps[-1] + 1,) * 2
        assert line["steps"] == pytest.approx(len(steps))
        assert line["signs"]["edges"] == [-9, 0, 9]
        assert line["signs"]["shares"] == pytest.approx([1 - share, share], abs=2e-6)


def test_a_skipped_step_does_not_count_in_vectors(tmp_path: Path) -> None:
    train_toy(tmp_path, steps=12, bad_steps=range(3, 5))
    told = [record["steps"] for record in read_metrics(tmp_path) if "loss" in record]
    assert told == pytest.approx([3, 3, 4])


def test_a_checkpoint_of_before_vectors_resumes_and_tells_of_the_steps_since(tmp_path: Path) -> None:
    expected, _ = train_toy(tmp_path, steps=12)
    folder = tmp_path / "checkpoints"
    shutil.rmtree(checkpoints(folder)[-1])
    saved = load_checkpoint(folder)
    assert saved is not None
    weights, averaged, state = saved
    del state["progress"]["vector_sums"]
    save_checkpoint(folder, state.pop("step"), weights=weights, averaged=averaged, state=state)
    assert train_toy(tmp_path, steps=12)[0] == expected
    told = [(record["step"], record["steps"]) for record in read_metrics(tmp_path) if "loss" in record]
    assert told == [(4, pytest.approx(4)), (8, pytest.approx(1)), (12, pytest.approx(4))]


def test_a_bad_step_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    _, task = train_toy(tmp_path, steps=12, bad_steps=range(3, 5))
    assert task.good == 10
    assert [record["skipped_steps"] for record in read_metrics(tmp_path) if "loss" in record] == [1, 2, 2]
    assert torch.isfinite(flat(tmp_path)).all()


def test_several_bad_steps_in_a_row_stop_the_run_with_advice(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"not finite in 3 steps in a row.*--run\.name with a lower learning_rate"):
        train_toy(tmp_path, steps=40, bad_steps=range(20, 30))
    assert checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000021"


def test_the_last_and_the_milestone_checkpoints_are_kept(tmp_path: Path) -> None:
    train_toy(tmp_path, steps=40, checkpoint_every=5, milestone_every=15)
    assert [int(p.name[5:]) for p in checkpoints(tmp_path / "checkpoints")] == [15, 30, 35, 40]


def test_snapshots_hold_what_sampling_would_use_and_the_widths(tmp_path: Path) -> None:
    train_toy(tmp_path, steps=20, snapshot_every=8)
    there = snapshots(tmp_path)
    assert list(there) == [8, 16, 20]
    saved = load_checkpoint(tmp_path / "checkpoints")
    assert saved is not None
    _, averaged, state = saved
    assert state["updates"] == {"first": 20, "first@0.05": 20, "first@0.1": 20}
    assert json.loads((there[16] / "snapshot.json").read_text())["updates"] == 16
    for found, key in (
        (read_snapshot(tmp_path, 20), "first"),
        (averaged_at(tmp_path, 20, 0.05), "first@0.05"),
        (averaged_at(tmp_path, 20, 0.1), "first@0.1"),
    ):
        assert found.keys() == averaged[key].keys()
        assert all(torch.equal(found[name], averaged[key][name]) for name in found)
    assert not torch.equal(averaged["first"]["3.weight"], averaged["first@0.05"]["3.weight"])


def test_snapshots_without_an_average_hold_the_weights(tmp_path: Path) -> None:
    train_toy(tmp_path, steps=6, snapshot_every=6, ema=0.0)
    saved = load_checkpoint(tmp_path / "checkpoints")
    assert saved is not None
    assert all(torch.equal(value, saved[0]["first"][name]) for name, value in read_snapshot(tmp_path, 6).items())


@pytest.mark.parametrize("at", [8, 16, 20])
def test_a_run_stopped_around_a_snapshot_has_the_same_snapshots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Between a snapshot and the checkpoint of its step, or at one of an older checkpoint."""
    expected, _ = train_toy(tmp_path / "whole", steps=20, snapshot_every=8)

    class Killed(_Trainer):
        def save(self) -> None:
            if self.step >= at:
                raise KeyboardInterrupt
            super().save()

    monkeypatch.setattr("engine.loop._Trainer", Killed)
    with pytest.raises(KeyboardInterrupt):
        train_toy(tmp_path / "killed", steps=20, snapshot_every=8, checkpoint_every=4)
    monkeypatch.undo()
    assert at in snapshots(tmp_path / "killed")
    assert train_toy(tmp_path / "killed", steps=20, snapshot_every=8, checkpoint_every=4)[0] == expected
    assert kept(tmp_path / "killed") == kept(tmp_path / "whole")


def test_snapshots_beyond_the_checkpoint_that_is_resumed_are_dropped(tmp_path: Path) -> None:
    train_toy(tmp_path, steps=40, snapshot_every=8)
    (checkpoints(tmp_path / "checkpoints")[-1] / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="is damaged"):
        train_toy(tmp_path, steps=37, snapshot_every=8)
    assert list(snapshots(tmp_path)) == [8, 16, 24, 32, 37]


def test_a_skipped_step_does_not_count_in_the_averages(tmp_path: Path) -> None:
    train_toy(tmp_path, steps=12, snapshot_every=6, bad_steps=range(3, 5))
    told = [json.loads((path / "snapshot.json").read_text()) for path in snapshots(tmp_path).values()]
    assert [(each["step"], each["updates"]) for each in told] == [(6, 4), (12, 10)]


def test_snapshots_of_no_network_or_of_several_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for averaged in ((), ("first", "second")):
        monkeypatch.setattr(Denoise, "averaged", averaged)
        with pytest.raises(
            ValueError, match=rf"snapshot_every=5 .* one network, but here {len(averaged)} are averaged"
        ):
            train_toy(tmp_path, steps=10, snapshot_every=5)


def test_previews_and_validation_are_written(tmp_path: Path) -> None:
    train_toy(tmp_path, steps=12)
    assert (tmp_path / "previews" / "step-00000010-grey.png").stat().st_size > 0
    assert [record["step"] for record in read_metrics(tmp_path) if "validation/mean" in record] == [10, 12]


def test_several_processes_train_to_the_weights_of_one(tmp_path: Path) -> None:
    train_toy(tmp_path / "one", snapshot_every=20)
    for parallel in ("ddp", "fsdp"):
        settings = {"parallel": parallel, "snapshot_every": 20}
        forked.run_two("toy:train_toy", tmp_path / parallel, told=tmp_path / "told", **settings)
        assert torch.allclose(flat(tmp_path / "one"), flat(tmp_path / parallel), atol=1e-6)
        for mine, theirs in zip(logged(tmp_path / "one"), logged(tmp_path / parallel), strict=True):
            assert mine.keys() == theirs.keys()
            if "signs" in mine:
                assert theirs["signs"]["shares"] == pytest.approx(mine["signs"]["shares"], abs=2e-6)
        for step, width in ((20, 0.05), (40, 0.1)):
            one, several = (averaged_at(tmp_path / name, step, width) for name in ("one", parallel))
            assert all(torch.allclose(one[name], several[name], atol=1e-6) for name in one)


def test_metrics_are_json_lines_with_rates(tmp_path: Path) -> None:
    train_toy(tmp_path, steps=8)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {
        "step",
        "loss",
        "size",
        "learning_rate",
        "grad_norm/first",
        "grad_norm/second",
        "samples_per_second",
    } <= lines[0].keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_networks_train_to_the_same_weights(tmp_path: Path) -> None:
    train_toy(tmp_path / "eager", steps=10)
    train_toy(tmp_path / "compiled", steps=10, compile=True)
    assert torch.allclose(flat(tmp_path / "eager"), flat(tmp_path / "compiled"), atol=1e-5)


def test_gradients_are_clipped_but_not_those_of_an_auxiliary_network() -> None:
    modules = {name: torch.nn.Linear(3, 1, bias=False) for name in ("main", "auxiliary")}
    for module in modules.values():
        module.weight.grad = torch.tensor([[3.0, 0.0, 4.0]])
    trainer = _Trainer.__new__(_Trainer)
    trainer.task, trainer.train = Task(), TrainConfig(clip_norm=1.0)
    trainer.task.modules, trainer.task.auxiliary = modules, ("auxiliary",)
    assert trainer._clipped_norms() == pytest.approx({"grad_norm/main": 5.0, "grad_norm/auxiliary": 5.0})
    assert modules["main"].weight.grad.norm() == pytest.approx(1.0, rel=1e-4)
    assert modules["auxiliary"].weight.grad.norm() == 5.0
