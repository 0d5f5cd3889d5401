"""What tests of trainings share: a network that says nothing, and the lines that a training told."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Silent(nn.Module):
    """A network that says nothing, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, logsnr: Tensor, condition: Tensor) -> Tensor:
        self.calls.append((x, logsnr, condition))
        return torch.zeros_like(x)


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in the folder of a stage."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
