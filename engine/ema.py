"""Averaged weights: an exponential moving average whose decay is warmed up over the first steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from engine.device import reshard


class Ema:
    """Shadow copy of a module's parameters; buffers are not averaged, they are the module's own.

    decay(n) = min(decay, (1 + n) / (10 + n)) after n updates: early weights are forgotten quickly.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = [_local(p).detach().clone() for p in module.parameters()]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, [_local(p).detach() for p in module.parameters()], 1 - decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Inside the block the module holds the averaged weights; afterwards its own again."""
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    @torch.no_grad()
    def _swap(self, module: nn.Module) -> None:
        reshard(module)
        for parameter, shadow in zip(module.parameters(), self.shadow, strict=True):
            local = _local(parameter)
            kept = local.detach().clone()
            local.copy_(shadow)
            shadow.copy_(kept)


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a distributed tensor; an ordinary tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
