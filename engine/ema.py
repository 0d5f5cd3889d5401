"""Averaged weights: an exponential moving average that is warmed up, and power-function averages of a chosen width."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from engine.device import reshard


class Average:
    """Shadow copy of a module's parameters; buffers are not averaged, they are the module's own."""

    def __init__(self, module: nn.Module) -> None:
        self.updates = 0
        self.shadow = [_local(p).detach().clone() for p in module.parameters()]

    def decay_at(self, update: int) -> float:
        """What is kept of the average at an update, counted from 1."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        share = 1 - self.decay_at(self.updates)
        torch._foreach_lerp_(self.shadow, [_local(p).detach() for p in module.parameters()], share)

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


class Ema(Average):
    """decay(n) = min(decay, (1 + n) / (10 + n)) after n updates: early weights are forgotten quickly.

    While the second term is the smaller one, update i of n weighs about 9 i^8 / n^9: a power-function average of width
    0.09. With a decay of 0.9999 that lasts for 89,990 updates.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__(module)
        self.decay = decay

    def decay_at(self, update: int) -> float:
        return min(self.decay, (1 + update) / (10 + update))


class PowerEma(Average):
    """The average with profile t^gamma over the updates so far: it always reaches back by the same share of them.

    beta(t) = (1 - 1 / t)^(gamma + 1) at update t, so that update i of t weighs (i^(gamma + 1) - (i - 1)^(gamma + 1)) /
    t^(gamma + 1), and the initial weights nothing (Karras et al., 2024, arXiv:2312.02696, section 3.1). `width` is
    sigma_rel, the profile's standard deviation over its length.
    """

    def __init__(self, module: nn.Module, width: float) -> None:
        super().__init__(module)
        self.width, self.gamma = width, power_exponent(width)

    def decay_at(self, update: int) -> float:
        return (1 - 1 / update) ** (self.gamma + 1)


def power_exponent(width: float) -> float:
    """gamma of a profile t^gamma whose standard deviation is `width` of its length; 0.05 -> 16.97, 0.1 -> 6.94.

    It solves width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a cubic in gamma (Karras et al., 2024, appendix C);
    widths lie below 1 / sqrt(12), that of the plain mean.
    """
    precision = width**-2
    return float(np.roots([1, 7, 16 - precision, 12 - precision]).real.max())


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a distributed tensor; an ordinary tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
