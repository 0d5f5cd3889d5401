"""The only training loop: any task, resumable to the bit, stopped cleanly by signals, guarded against bad steps.

The loop owns cadence, accumulation, clipping, averaging, checkpoints and logging. The task owns its networks, its
optimizers and its loss.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine import checkpoint, log, resume
from engine.batches import Batches, StepRandom, mix
from engine.config import RunConfig, TrainConfig
from engine.device import Device, full_state
from engine.ema import Average, Ema, PowerEma
from engine.optim import set_learning_rate
from engine.signals import agreed, caught_signals, leave
from engine.snapshots import write_snapshot
from engine.task import Task


def fit(
    task: Task,
    batches: Batches,
    *,
    train: TrainConfig,
    run: RunConfig,
    device: Device,
    folder: Path,
    identity: dict[str, Any],
    defaults: dict[str, Any] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Train a task to `train.steps`, continuing from the newest valid checkpoint in `folder`.

    `identity` is all that defines the run, as JSON-ready values; a run is not resumed under another one,
    where keys that its first start did not know yet count as their `defaults`. Returns the
    final weights by network name, averaged where the task says so, on the CPU.

    Raises:
        ValueError: the configuration differs from the one that the folder was begun with.
        RuntimeError: too many steps in a row were not finite.
        Interrupted: SIGTERM or SIGINT came; the same command resumes.
    """
    if device.is_main:
        resume.check_identity(folder, {**identity, "precision": device.precision}, defaults)
    device.barrier()
    trainer = _Trainer(task, batches, train=train, run=run, device=device, folder=folder)
    trainer.load()
    if trainer.step > train.steps:
        raise ValueError(f"{folder} has {trainer.step} steps behind it, train.steps={train.steps} is less: raise it")
    if trainer.step < train.steps:
        trainer.train_on()
    weights = {name: full_state(module) for name, module in task.modules.items()}
    return {**weights, **resume.averaged_state(task.modules, trainer.averages)}


class _Trainer:
    def __init__(
        self, task: Task, batches: Batches, *, train: TrainConfig, run: RunConfig, device: Device, folder: Path
    ) -> None:
        self.task, self.batches, self.train, self.run = task, batches, train, run
        self.device, self.folder = device, folder
        self.step, self.bad_steps, self.skipped = 0, 0, 0
        # Sums and counts of each metric over the good steps since the last line of the log.
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.vector_sums: dict[str, list[float]] = {}  # over the same steps
        self.parts = range(device.rank * train.accumulate, (device.rank + 1) * train.accumulate)
        self.num_parts = device.world * train.accumulate
        for name, module in task.modules.items():
            auxiliary = name in task.auxiliary
            if run.compile and not auxiliary:
                module.compile()
            task.modules[name] = device.share(module, task.optimizers[name], copy=auxiliary)
        self.averages = {name: Ema(task.modules[name], train.ema) for name in task.averaged if train.ema}
        self.powers = {
            f"{name}@{width}": PowerEma(task.modules[name], width)
            for name in task.averaged
            for width in train.ema_widths
        }
        if train.snapshot_every and len(task.averaged) != 1:
            raise ValueError(
                f"train.snapshot_every={train.snapshot_every} keeps the averaged weights of one network, but here"
                f" {len(task.averaged)} are averaged: set it to 0"
            )

    def train_on(self) -> None:
        """From the present step to the last."""
        self._set_mode(training=True)
        metrics = self._open_metrics()
        main = self.device.is_main
        bar = log.progress(total=self.train.steps, title=self.folder.name, initial=self.step, enabled=main)
        stream = self.batches.stream(self.step, self.parts, self.num_parts)
        with bar, contextlib.closing(stream), caught_signals() as caught:  # type: ignore[type-var]
            self.since, self.since_step = time.monotonic(), self.step
            while self.step < self.train.steps:
                self._one_step(stream)
                self._report(metrics, bar)
                stop = agreed(caught, self.device)
                if self._due(self.train.snapshot_every):
                    self._keep_snapshot()  # before the checkpoint, so that a run resumes with its snapshots behind it
                if stop or self._due(self.train.checkpoint_every):
                    self.save()
                if stop:
                    leave(stop, f"{self.folder}: step {self.step} of {self.train.steps}", speak=self.device.is_main)
        if metrics is not None:
            metrics.close()

    # One step

    def _one_step(self, stream: Iterator[dict[str, Tensor]]) -> None:
        totals: dict[str, Tensor] = {}
        self.task.before_step()
        for part in self.parts:
            for key, value in self._forward_backward(next(stream), part).items():
                totals[key] = totals.get(key, 0.0) + value.detach().float() / self.train.accumulate
        norms = self._clipped_norms()
        figures, vectors = self._reduced(totals)
        metrics = {**figures, **norms}
        if math.isfinite(metrics["loss"]) and all(math.isfinite(metrics[key]) for key in norms):
            self._update(metrics, vectors)
        else:
            self._skip(metrics)
        for optimizer in self.task.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _forward_backward(self, batch: dict[str, Tensor], part: int) -> dict[str, Tensor]:
        """Forward in the run's precision, then backward; gradients are exchanged with the last part only."""
        torch.manual_seed(mix(self.run.seed, self.step, part, 3))  # dropout
        moved = {key: value.to(self.device.device, non_blocking=True) for key, value in batch.items()}
        with contextlib.ExitStack() as stack:
            if part != self.parts[-1]:
                for module in self.task.modules.values():
                    if isinstance(module, DistributedDataParallel):
                        stack.enter_context(module.no_sync())
            with self.device.autocast():
                values = self.task.step(moved, self._rng(part, self.num_parts))
            (values["loss"] / self.train.accumulate).backward()
        return values

    def _rng(self, part: int = 0, parts: int = 1, stream: int = 2) -> StepRandom:
        size, device = self.train.batch_size, self.device.device
        return StepRandom(self.run.seed, self.step, size, part=part, parts=parts, device=device, stream=stream)

    def _update(self, metrics: dict[str, float], vectors: dict[str, list[float]]) -> None:
        for optimizer in self.task.optimizers.values():
            set_learning_rate(optimizer, self.step, self.train)
            optimizer.step()
        for name, average in self._all_averages.items():
            average.update(self.task.modules[resume.averaged_network(name)])
        self.bad_steps = 0
        self.task.after_step(self.step, metrics, self._rng(stream=4))
        for key, value in metrics.items():
            self.sums[key], self.counts[key] = self.sums.get(key, 0.0) + value, self.counts.get(key, 0) + 1
        for key, values in vectors.items():
            before = self.vector_sums.get(key, [0.0] * len(values))
            self.vector_sums[key] = [sum(pair) for pair in zip(before, values, strict=True)]

    def _skip(self, metrics: dict[str, float]) -> None:
        """A step that is not finite changes nothing; several in a row stop the run."""
        self.bad_steps, self.skipped = self.bad_steps + 1, self.skipped + 1
        if self.bad_steps >= self.train.max_bad_steps:
            shown = ", ".join(f"{key} {metrics[key]:.3g}" for key in metrics if key == "loss" or "grad_norm" in key)
            raise RuntimeError(
                f"{self.folder}: loss or gradient was not finite in {self.bad_steps} steps in a row, the last at step "
                f"{self.step} ({shown}). Checkpoints are whole. Resume with --run.precision=fp32, or start anew under "
                "another --run.name with a lower learning_rate or a longer warm-up"
            )

    def _reduced(self, totals: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Means over all processes, in one message: of the scalars, and of the vectors entry by entry."""
        flat = self.device.mean(torch.cat([total.reshape(-1) for total in totals.values()])).cpu()
        parts = zip(totals.items(), flat.split([total.numel() for total in totals.values()]), strict=True)
        means = {key: part.reshape(total.shape).tolist() for (key, total), part in parts}
        figures = {key: mean for key, mean in means.items() if isinstance(mean, float)}
        return figures, {key: mean for key, mean in means.items() if key not in figures}

    def _clipped_norms(self) -> dict[str, float]:
        """Clips each network's gradient, but not an auxiliary one's; its norm before that."""
        norms = {}
        for name, module in self.task.modules.items():
            limit = math.inf if name in self.task.auxiliary else self.train.clip_norm or math.inf
            norm = nn.utils.clip_grad_norm_(module.parameters(), limit)
            norms[f"grad_norm/{name}"] = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        return norms

    # Telling

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.train.steps)

    def _open_metrics(self) -> log.Metrics | None:
        if not self.device.is_main:
            return None
        return log.Metrics(self.folder, resume_step=self.step, tensorboard=self.run.tensorboard)

    def _report(self, metrics: log.Metrics | None, bar: log.Progress) -> None:
        figures = self._figures() if self._due(self.train.log_every) else {}
        loss = figures.get("loss")
        bar.update(1, **({"loss": loss} if isinstance(loss, float) else {}))
        if figures:
            if metrics is not None:
                metrics.write(self.step, figures)
            self.sums, self.counts, self.vector_sums = {}, {}, {}
            self.since, self.since_step = time.monotonic(), self.step
        if self._due(self.train.preview_every):
            self._show(metrics)

    def _figures(self) -> dict[str, float | log.Histogram]:
        """Means over the good steps since the last line, what the task tells of its vectors, and how fast they went."""
        rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in self.task.optimizers.items()}
        first, *others = rates
        samples = (self.step - self.since_step) * self.train.batch_size
        return {
            **{key: value / self.counts[key] for key, value in self.sums.items()},
            **(self.task.told(self.step, self.vector_sums) if self.vector_sums else {}),
            "learning_rate": rates[first],
            **{f"learning_rate/{name}": rates[name] for name in others},
            "skipped_steps": float(self.skipped),
            "samples_per_second": samples / max(time.monotonic() - self.since, 1e-9),
        }

    def _show(self, metrics: log.Metrics | None) -> None:
        """Validation figures and preview pictures, with averaged weights in place."""
        begun = time.monotonic()
        with contextlib.ExitStack() as stack:
            for name, average in self.averages.items():
                stack.enter_context(average.applied(self.task.modules[name]))
            stack.enter_context(torch.no_grad())
            self._set_mode(training=False)
            figures, pictures = self.task.validate(), self.task.preview()
            self._set_mode(training=True)
        if metrics is not None:
            if figures:
                metrics.write(self.step, {f"validation/{key}": value for key, value in figures.items()})
            for name, images in pictures.items():
                path = self.folder / "previews" / f"step-{self.step:08d}-{name}.png"
                log.save_grid(images, path, columns=max(1, math.isqrt(len(images))))
        self.since += time.monotonic() - begun

    def _set_mode(self, *, training: bool) -> None:
        for module in self.task.modules.values():
            module.train(training)

    # Saving and resuming

    @property
    def _all_averages(self) -> dict[str, Average]:
        return {**self.averages, **self.powers}

    def _keep_snapshot(self) -> None:
        """Write the averaged weights for good: the weights themselves where there is no average."""
        (network,) = self.task.averaged
        if self.device.is_main or self.device.parallel == "fsdp":
            states = resume.averaged_state(self.task.modules, self._all_averages)
            model = states[network] if network in states else full_state(self.task.modules[network])
            widths = {average.width: states[name] for name, average in self.powers.items()}
            if self.device.is_main:
                folder, updates = self.folder / "snapshots", self.step - self.skipped
                write_snapshot(folder, self.step, updates=updates, model=model, widths=widths)
        self.device.barrier()

    def save(self) -> None:
        """Write a checkpoint: the first process alone, unless the weights must be gathered from all."""
        if self.device.is_main or self.device.parallel == "fsdp":
            self._save()
        self.device.barrier()

    def _save(self) -> None:
        weights, averaged, state = resume.capture(self.task.modules, self.task.optimizers, self._all_averages)
        kept = ("sums", "counts", "vector_sums", "bad_steps", "skipped")
        progress = {key: getattr(self, key) for key in kept}
        state |= {"task": self.task.state_dict(), "progress": progress}
        if self.device.is_main:
            folder = self.folder / "checkpoints"
            checkpoint.save_checkpoint(folder, self.step, weights=weights, averaged=averaged, state=state)
            checkpoint.prune(folder, keep_last=self.train.keep_last, milestone_every=self.train.milestone_every)

    def load(self) -> None:
        """Continue from the newest valid checkpoint, if there is one."""
        folder = self.folder / "checkpoints"
        saved = checkpoint.load_checkpoint(folder)
        found = 0 if saved is None else saved[2]["step"]
        steps = torch.tensor([found, found**2], dtype=torch.float64, device=self.device.device)
        mean, mean_square = self.device.mean(steps).tolist()
        if mean_square > mean**2:
            raise RuntimeError(f"{folder}: the processes see different checkpoints; the run's folder must be shared")
        if self.device.is_main:
            for kept in (folder, self.folder / "snapshots"):
                checkpoint.drop_beyond(kept, found)
        self.device.barrier()
        if saved is None:
            return
        resume.restore(self.task.modules, self.task.optimizers, self._all_averages, saved)
        state = saved[2]
        self.task.load_state_dict(state["task"])
        self.step = state["step"]
        for name, value in state["progress"].items():
            setattr(self, name, value)
        if self.device.is_main:
            print(f"{self.folder}: resuming at step {self.step} of {self.train.steps}", file=sys.stderr)
