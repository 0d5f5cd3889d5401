"""Guidance: a sharper denoiser out of two, D = W + g (D_strong - W) with a weaker denoiser W.

W is the same network without a condition (classifier-free guidance), or another, weaker network under the same
condition (autoguidance). All is said in estimates of x0, which any prediction target gives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from generator.solvers import Denoise

# (z [B, ...], log SNR [B], condition [B, ...]) -> x0 [B, ...]
ConditionalDenoise = Callable[[Tensor, Tensor, Tensor], Tensor]
# (z [B, ...], log SNR [B]) -> x0 of the network that is guided and of the weaker one, each [B, ...]
Both = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def guided(
    denoise: ConditionalDenoise,
    condition: Tensor,
    *,
    null: Tensor,
    scale: float,
    first: float | None = None,
    last: float | None = None,
    rescale: float = 0.0,
    guide: ConditionalDenoise | None = None,
) -> Denoise:
    """The guided denoiser of the rows of a condition, [B, ...].

    Args:
        null: rows that stand for no condition, shaped alike.
        scale: g; 1 asks only `denoise` itself.
        first, last: log SNRs between which, ends included, guidance acts (Kynkaanniemi et al., 2024); elsewhere
            `denoise` is asked alone. Absent: no such end. All rows of a batch must be at one level.
        rescale: share of the way back to the deviation of the unguided estimate, see `rescaled`.
        guide: the weaker network of autoguidance; without it guidance is classifier-free.
    """

    def plain(z: Tensor, logsnr: Tensor) -> Tensor:
        return denoise(z, logsnr, condition)

    def combined(z: Tensor, logsnr: Tensor) -> Tensor:
        if not _acts(logsnr, first, last):
            return plain(z, logsnr)
        strong, weak = both(z, logsnr)
        return rescaled(weak + scale * (strong - weak), strong, rescale)

    both = _classifier_free(denoise, condition, null) if guide is None else _autoguidance(denoise, guide, condition)
    return plain if scale == 1 else combined


def rescaled(x0: Tensor, reference: Tensor, share: float) -> Tensor:
    """Guided estimates [B, ...] brought back towards the deviation of unguided ones (Lin et al., 2024, section 3.4).

    Each sample is multiplied by (1 - share) + share std(reference) / std(x0), taken over its own numbers. The paper
    rescales the network's prediction; this rescales x0, so that the result does not depend on what is predicted.
    """
    if share == 0:
        return x0
    own, wanted = (_deviation(each) for each in (x0, reference))
    ratio = torch.where(own > 0, wanted / own, 1)
    return x0 * (1 + share * (ratio - 1))


def _classifier_free(denoise: ConditionalDenoise, condition: Tensor, null: Tensor) -> Both:
    """With a condition and without in one call (Ho & Salimans, 2022)."""
    rows = torch.cat([condition, null])

    def both(z: Tensor, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        conditional, unconditional = denoise(torch.cat([z, z]), torch.cat([logsnr, logsnr]), rows).chunk(2)
        return conditional, unconditional

    return both


def _autoguidance(denoise: ConditionalDenoise, guide: ConditionalDenoise, condition: Tensor) -> Both:
    """Two networks under the same condition (Karras et al., 2024, arXiv:2406.02507)."""
    return lambda z, logsnr: (denoise(z, logsnr, condition), guide(z, logsnr, condition))


def _acts(logsnr: Tensor, first: float | None, last: float | None) -> bool:
    """Whether this level lies in the interval; compared in the level's own precision, so that ends count as inside."""
    level = logsnr[0]
    above = first is None or bool(level >= level.new_tensor(first))
    return above and (last is None or bool(level <= level.new_tensor(last)))


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation of each row's numbers: [B, ...] -> [B, 1, ...]."""
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)
