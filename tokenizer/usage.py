"""How much of the codebook is in use while it is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NEVER = 2**40  # steps
WINDOW_TOKENS = 65_536  # running figures look back over so many codes


class Usage:
    """Counts for each code, on the CPU: `idle`, the steps since its last use, and `waited`, those since that or its
    revival, int64 [K]; `running`, how often it was chosen, older steps fading out, float64 [K].

    Args:
        codes_per_step: codes chosen in one step over all processes.
    """

    def __init__(self, vocab_size: int, *, codes_per_step: int) -> None:
        self.window = max(1, -(-WINDOW_TOKENS // codes_per_step))  # steps
        self.idle = torch.full((vocab_size,), NEVER)
        self.waited = torch.zeros(vocab_size, dtype=torch.int64)
        self.running = torch.zeros(vocab_size, dtype=torch.float64)

    def update(self, counts: Tensor) -> None:
        """Take in how often each code was chosen in one step over all processes, [K]."""
        counts = counts.cpu().double()
        self.idle, self.waited = (torch.where(counts > 0, 0, steps + 1) for steps in (self.idle, self.waited))
        self.running = self.running * (1 - 1 / self.window) + counts

    def share(self, steps: int) -> float:
        """Share of the codes chosen in the last `steps` steps."""
        return (self.idle < steps).double().mean().item()

    def dead(self) -> int:
        """Codes not chosen once in the last WINDOW_TOKENS tokens."""
        return int((self.idle >= self.window).sum())

    def perplexity(self) -> float:
        """Of the running counts, in which a step's weight falls to 1/e over WINDOW_TOKENS tokens."""
        return perplexity(self.running)

    def expired(self, steps: int) -> Tensor:
        """Codes that have waited for `steps` steps or more, bool [K]; their wait begins anew."""
        dead = self.waited >= steps
        self.waited = self.waited.masked_fill(dead, 0)
        return dead

    def state_dict(self) -> dict[str, Any]:
        return {"idle": self.idle, "waited": self.waited, "running": self.running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.idle, self.waited, self.running = state["idle"], state["waited"], state["running"]


def perplexity(counts: Tensor) -> float:
    """exp(entropy) of how often each code was chosen, [K]: K when all are equally frequent, 1 when one is."""
    shares = counts.double() / counts.sum()
    return torch.special.entr(shares).sum().exp().item()
