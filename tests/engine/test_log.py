from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine import log
from engine.log import Histogram, Metrics, clock, progress, read_metrics, save_grid


def test_resuming_forgets_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    for step in (1, 2, 3):
        metrics.write(step, {"loss": 1.0 / step})
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 4, "lo')  # cut by a kill
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    Metrics(tmp_path, resume_step=2).write(3, {"loss": 9.0})
    assert [(record["step"], record["loss"]) for record in read_metrics(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_numbers_that_json_lacks_stay_readable(tmp_path: Path) -> None:
    Metrics(tmp_path).write(1, {"loss": float("nan")})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": "nan"}]


def test_a_histogram_is_a_record_of_edges_and_shares(tmp_path: Path) -> None:
    Metrics(tmp_path).write(1, {"draws": Histogram((-1, 0, 1), (1 / 3, 2 / 3))})
    assert read_metrics(tmp_path) == [{"step": 1, "draws": {"edges": [-1, 0, 1], "shares": [0.333333, 0.666667]}}]


def test_tensorboard_gets_the_same_figures(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics = Metrics(tmp_path, tensorboard=True)
    metrics.write(3, {"loss": 0.25, "draws": Histogram((-1, 0, 1, 2), (0.5, 0.0, 0.5))})
    metrics.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.25)]
    (event,) = events.Histograms("draws")
    drawn = event.histogram_value
    assert (event.step, drawn.min, drawn.max, drawn.num, drawn.sum, drawn.sum_squares) == (3, -1, 2, 1, 0.5, 1.25)
    assert (drawn.bucket_limit, drawn.bucket) == ([0, 1, 2], [0.5, 0, 0.5])


def test_plain_lines_tell_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "PLAIN_SECONDS", -1.0)
    with progress(total=4, title="train", unit="image") as bar:
        bar.update(2, loss=0.5)
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("train  2/4  loss 0.5") and "image/s" in first and first.endswith("left")


def test_only_an_enabled_bar_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(total=4, title="train", enabled=False) as bar:
        bar.update(4)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (65, "1:05"), (3600, "1:00:00"), (float("inf"), "?")])
def test_the_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_grid_holds_every_image_row_by_row(tmp_path: Path) -> None:
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).mul(50).expand(5, 3, 64, 64)
    save_grid(images, tmp_path / "grid.png", columns=3)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    assert [pixels[34 + 66 * (i // 3), 34 + 66 * (i % 3), 0] for i in range(5)] == [0, 50, 100, 150, 200]
    assert pixels[100, 170, 0] == 255  # the empty place
