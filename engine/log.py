"""What a run tells: metrics.jsonl (the source of truth), a progress bar or plain lines, TensorBoard, picture grids."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from engine.checkpoint import write_atomic

PLAIN_SECONDS = 10.0  # between lines when the output is not a terminal


@dataclass(frozen=True)
class Histogram:
    """Shares [K] of what fell between each two of K + 1 rising edges."""

    edges: Sequence[float]
    shares: Sequence[float]


class Metrics:
    """Appends records to metrics.jsonl; on resume it forgets what lies beyond the checkpoint."""

    def __init__(self, folder: Path, *, resume_step: int = 0, tensorboard: bool = False) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [record for record in read_metrics(folder) if record["step"] <= resume_step]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomic(self.path, lines.encode())
        self.board = _summary_writer(folder, resume_step) if tensorboard else None

    def write(self, step: int, values: Mapping[str, float | Histogram]) -> None:
        """One record; numbers that are not finite become strings, as JSON has none."""
        record = json.dumps({"step": step, **{key: _safe(value) for key, value in values.items()}})
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(record + "\n")
        if self.board is not None:
            for key, value in values.items():
                _show(self.board, key, value, step)
            self.board.flush()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def _safe(value: float | Histogram) -> Any:
    if isinstance(value, Histogram):
        return {"edges": list(value.edges), "shares": [round(share, 6) for share in value.shares]}
    return value if math.isfinite(value) else str(value)


def _show(board: Any, key: str, value: float | Histogram, step: int) -> None:
    """Put a value on TensorBoard; a histogram's sums are those of its bins' middles."""
    if not isinstance(value, Histogram):
        board.add_scalar(key, value, step)
        return
    edges, shares = np.asarray(value.edges, float), np.asarray(value.shares, float)
    middles = (edges[:-1] + edges[1:]) / 2
    board.add_histogram_raw(
        key, min=edges[0], max=edges[-1], num=shares.sum(), sum=shares @ middles, sum_squares=shares @ middles**2,
        bucket_limits=edges[1:].tolist(), bucket_counts=shares.tolist(), global_step=step,
    )  # fmt: skip


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole records of a run's metrics.jsonl; the cut last line of a killed process is left out."""
    path, records = folder / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Progress:
    """Progress of a long job: a bar with rate and ETA on a terminal, else a plain line every few seconds."""

    def __init__(self, *, total: int, title: str, unit: str = "step", initial: int = 0, enabled: bool = True) -> None:
        self.total, self.title, self.unit, self.done, self.initial = total, title, unit, initial, initial
        self.start = self.last = time.monotonic()
        self.shown: dict[str, str] = {}
        self.enabled, self.bar = enabled, None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=title, unit=unit, initial=initial, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.enabled:
            self._print()

    def update(self, count: int = 1, **shown: float) -> None:
        """`count` more are done; `shown` are figures to print beside."""
        self.done += count
        self.shown.update({key: f"{value:.4g}" for key, value in shown.items()})
        if self.bar is not None:
            if shown:
                self.bar.set_postfix(self.shown, refresh=False)
            self.bar.update(count)
        elif self.enabled and time.monotonic() - self.last > PLAIN_SECONDS:
            self._print()

    def _print(self) -> None:
        self.last = time.monotonic()
        seconds = self.last - self.start
        rate = (self.done - self.initial) / max(seconds, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else math.inf
        figures = "".join(f"  {key} {value}" for key, value in self.shown.items())
        timing = f"{rate:.3g} {self.unit}/s  {clock(seconds)} gone  {clock(left)} left"
        print(f"{self.title}  {self.done}/{self.total}{figures}  {timing}", file=sys.stderr, flush=True)


def progress(*, total: int, title: str, unit: str = "step", initial: int = 0, enabled: bool = True) -> Progress:
    """A `Progress`; `enabled` should be true on one process only."""
    return Progress(total=total, title=title, unit=unit, initial=initial, enabled=enabled)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def save_grid(images: Tensor, path: Path, *, columns: int, gap: int = 2) -> None:
    """Write uint8 images [N, 3, H, W] as one PNG, row by row; small images are enlarged without smoothing."""
    from PIL import Image

    scale = max(1, 64 // images.shape[-1])
    tiles = images.cpu().numpy().transpose(0, 2, 3, 1).repeat(scale, axis=1).repeat(scale, axis=2)  # [N, H, W, 3]
    count, height, width, _ = tiles.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=np.uint8)
    for index, tile in enumerate(tiles):
        top, left = (index // columns) * (height + gap) + gap, (index % columns) * (width + gap) + gap
        canvas[top : top + height, left : left + width] = tile
    write_atomic(path, lambda draft: Image.fromarray(canvas).save(draft, format="PNG", optimize=True))


def _summary_writer(folder: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("run.tensorboard=true needs TensorBoard: pip install 'tokenloom[track]'") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)
