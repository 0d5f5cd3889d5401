"""A tiny task for the loop's tests."""

import hashlib
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engine.batches import Batches, StepRandom
from engine.config import RunConfig, TrainConfig
from engine.device import setup
from engine.log import Histogram
from engine.loop import fit
from engine.optim import build_optimizer
from engine.task import Task


class Noise:
    """Fifty fixed vectors."""

    def __init__(self) -> None:
        self.rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, Tensor]:
        assert draws is not None
        return {"rows": self.rows[torch.from_numpy(indices)] + torch.from_numpy(draws[:, :1]).float()}


class Denoise(Task):
    """Two networks and two optimizers, dropout, noise from the step's own generator, and a counter to carry over."""

    averaged = ("first",)

    def __init__(
        self, train: TrainConfig, *, dropout: float = 0.0, bad_steps: range = range(0), pause: float = 0.0
    ) -> None:
        torch.manual_seed(0)
        self.modules = {
            "first": nn.Sequential(
                nn.ModuleList([nn.Linear(8, 16)])[0], nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8)
            ),
            "second": nn.Linear(8, 8),
        }
        self.optimizers = {name: build_optimizer(module, train) for name, module in self.modules.items()}
        self.bad_steps, self.pause, self.good, self.seen = bad_steps, pause, 0, 0

    def step(self, batch: dict[str, Tensor], rng: StepRandom) -> dict[str, Tensor]:
        time.sleep(self.pause)
        rows = batch["rows"]
        first = self.modules["first"](rows + 0.1 * rng.normal(8))
        second = self.modules["second"](rows)
        loss = (first - rows).square().mean() + (second - first.detach()).square().mean()
        self.seen += 1
        return {
            "loss": loss * (torch.nan if self.seen - 1 in self.bad_steps else 1.0),
            "size": rows.square().mean(),
            "signs": torch.stack([(rows <= 0).float().mean(), (rows > 0).float().mean()]),
        }

    def told(self, step: int, sums: dict[str, list[float]]) -> dict[str, float | Histogram]:
        """The shares add up to 1 in each step, so that their sum counts the steps."""
        steps = sum(sums["signs"])
        shares = Histogram((-9, 0, 9), [each / steps for each in sums["signs"]])
        return {"steps": steps, "before": step, "signs": shares}

    def after_step(self, step: int, metrics: dict[str, float], rng: StepRandom) -> None:
        self.good += 1

    def validate(self) -> dict[str, float]:
        return {"mean": float(self.modules["first"](torch.ones(1, 8)).mean())}

    def preview(self) -> dict[str, Tensor]:
        return {"grey": torch.full((4, 3, 8, 8), 128, dtype=torch.uint8)}

    def state_dict(self) -> dict[str, int]:
        return {"good": self.good}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.good = state["good"]


def train_toy(
    folder: Path,
    *,
    steps: int = 40,
    accumulate: int = 1,
    dropout: float = 0.0,
    bad_steps: range = range(0),
    pause: float = 0.0,
    learning_rate: float = 1e-3,
    compile: bool = False,
    parallel: str = "ddp",
    checkpoint_every: int = 7,
    milestone_every: int = 0,
    snapshot_every: int = 0,
    ema: float = 0.999,
    batch_size: int = 16,
) -> tuple[str, Denoise]:
    """Train and return the sha256 of the final weights, and the task."""
    train = TrainConfig(
        steps=steps, batch_size=batch_size, accumulate=accumulate, learning_rate=learning_rate, log_every=4,
        preview_every=10, checkpoint_every=checkpoint_every, milestone_every=milestone_every, max_bad_steps=3, ema=ema,
        snapshot_every=snapshot_every, ema_widths=(0.05, 0.1) if snapshot_every else (),
    )  # fmt: skip
    run = RunConfig(device="cpu", precision="fp32", threads=1, compile=compile, parallel=parallel)  # type: ignore[arg-type]
    task = Denoise(train, dropout=dropout, bad_steps=bad_steps, pause=pause)
    batches = Batches(Noise(), batch_size=batch_size, seed=0, workers=1)
    identity = {"train": {"steps": steps, "learning_rate": learning_rate}}
    weights = fit(task, batches, train=train, run=run, device=setup(run), folder=folder, identity=identity)
    return digest(weights), task


def digest(weights: dict[str, dict[str, Tensor]]) -> str:
    """sha256 of all weights in order of their names."""
    total = hashlib.sha256()
    for name in sorted(weights):
        for key in sorted(weights[name]):
            total.update(weights[name][key].numpy().tobytes())
    return total.hexdigest()


def flat(folder: Path) -> Tensor:
    """The weights of the newest checkpoint as one vector."""
    from engine.checkpoint import load_checkpoint

    saved = load_checkpoint(folder / "checkpoints")
    assert saved is not None
    weights = saved[0]
    return torch.cat([weights[name][key].flatten() for name in sorted(weights) for key in sorted(weights[name])])
