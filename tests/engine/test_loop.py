import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine.checkpoint import checkpoints
from engine.config import TrainConfig
from engine.log import read_metrics
from engine.loop import _Trainer
from engine.task import Task

sys.path.insert(0, str(Path(__file__).parent))
from toy import flat, train_toy

TOY = [sys.executable, str(Path(__file__).parent / "toy.py")]


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*TOY, str(folder), *words], **pipes, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def logged(folder: Path) -> list[dict]:
    """metrics.jsonl without the figures that are times."""
    return [{k: v for k, v in record.items() if k != "samples_per_second"} for record in read_metrics(folder)]


def test_killed_at_random_moments_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    expected, _ = train_toy(tmp_path / "whole", steps=60, dropout=0.2)
    moments = random.Random(0)
    for _ in range(4):
        process = start(tmp_path / "killed", "steps=60", "dropout=0.2", "pause=0.02")
        count = len(read_metrics(tmp_path / "killed"))
        wait_for(lambda count=count: len(read_metrics(tmp_path / "killed")) > count, process)
        time.sleep(moments.random() * 0.2)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert 4 <= len(read_metrics(tmp_path / "killed")) < len(read_metrics(tmp_path / "whole"))
    actual, task = train_toy(tmp_path / "killed", steps=60, dropout=0.2)
    assert actual == expected
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    assert task.good == 60


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_says_so_and_resumes_exactly(tmp_path: Path, number: signal.Signals) -> None:
    expected, _ = train_toy(tmp_path / "whole", steps=50)
    process = start(tmp_path / "stopped", "steps=50", "pause=0.05", "checkpoint_every=1000")
    wait_for(lambda: read_metrics(tmp_path / "stopped"), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}" in errors and "the same command resumes" in errors
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


def test_previews_and_validation_are_written(tmp_path: Path) -> None:
    train_toy(tmp_path, steps=12)
    assert (tmp_path / "previews" / "step-00000010-grey.png").stat().st_size > 0
    assert [record["step"] for record in read_metrics(tmp_path) if "validation/mean" in record] == [10, 12]


def test_several_processes_train_to_the_weights_of_one(tmp_path: Path) -> None:
    train_toy(tmp_path / "one")
    for parallel in ("ddp", "fsdp"):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [*torchrun, TOY[1], str(tmp_path / parallel), f"parallel={parallel}"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert torch.allclose(flat(tmp_path / "one"), flat(tmp_path / parallel), atol=1e-6)


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
