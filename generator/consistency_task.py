"""Improved consistency training (Song & Dhariwal, 2024): a network learns to agree with itself one noise lower."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.batches import StepRandom
from engine.log import Histogram
from generator.consistency import pseudo_huber
from generator.diffusion_task import LOGSNR_EDGES, VALIDATION_IMAGES, DiffusionTask, draws_by_logsnr
from generator.discretisation import draw_pairs, noise_count, noises_of
from generator.path import noised


class ConsistencyTask(DiffusionTask):
    """Trains f on pairs of neighbouring noises s_i < s_(i + 1) of the same latents with the same noise eps.

    The loss is d(f(x0 + s_(i + 1) eps), f(x0 + s_i eps)) / (s_(i + 1) - s_i); the second f, the teacher, is the same
    network and passes no gradient on.
    """

    def step(self, batch: dict[str, Tensor], rng: StepRandom) -> dict[str, Tensor]:
        latents = batch["latents"].float()
        noises = self.noises(rng.step)  # [N]
        pairs, eps = draw_pairs(self.config.objective, noises, rng), rng.normal(*latents.shape[1:])
        losses, distances, logsnr = self.compared(latents, self.conditions(batch, rng), eps, noises, pairs)
        return {
            "loss": losses.mean(),
            "distance": distances.detach().mean(),
            "num_noises": losses.new_tensor(float(len(noises))),
            "mean_log_sigma": -logsnr.mean() / 2,
            "draws_by_logsnr": draws_by_logsnr(logsnr),
        }

    def noises(self, step: int) -> Tensor:
        """The noises that a step draws from, float64 [N]."""
        return noises_of(self.config.objective, noise_count(self.config.objective, step, self.config.train.steps))

    def compared(
        self, x0: Tensor, condition: Tensor, eps: Tensor, noises: Tensor, pairs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [B], distances [B] and the student's log SNR [B] of latents and noise at pairs [B] of noises [N]."""
        low, high = (noises.to(x0.device)[pairs + more] for more in (0, 1))  # [B]
        logsnr, lower_logsnr = ((-2 * s.log()).float() for s in (high, low))
        # The student first: autocast keeps the weights that it has converted, and those of a teacher have no gradient.
        student = self.ends(x0, condition, eps, logsnr)
        with torch.no_grad():
            teacher = self.ends(x0, condition, eps, lower_logsnr)
        config = self.config.objective
        distances = pseudo_huber(student, teacher, scale=config.huber_scale, form=config.huber)
        return distances / (high - low).float(), distances, logsnr

    def ends(self, x0: Tensor, condition: Tensor, eps: Tensor, logsnr: Tensor) -> Tensor:
        """f [B, C, h, w] at log SNR [B] of latents and noise [B, C, h, w]."""
        z = noised(x0, eps, logsnr)
        output = self.modules["network"](self.objective.network_input(z, logsnr), logsnr, condition).float()
        return self.objective.to_x0(output, z, logsnr)

    def told(self, step: int, sums: dict[str, list[float]]) -> dict[str, float | Histogram]:
        """Between which log SNRs the students of the next step lie, and a histogram of those since the last line."""
        noises, total = self.noises(step), sum(sums["draws_by_logsnr"])
        return {
            "curriculum/lowest_logsnr": float(-2 * noises[-1].log()),
            "curriculum/highest_logsnr": float(-2 * noises[1].log()),
            "curriculum/draws": Histogram(LOGSNR_EDGES, [count / total for count in sums["draws_by_logsnr"]]),
        }

    def validate(self) -> dict[str, float]:
        """Loss and distance on held-out latents, at the noises of the last step, with the same draws every time."""
        num, last = min(VALIDATION_IMAGES, len(self.test_shards)), self.config.train.steps - 1
        noises = self.noises(last)
        pairs = draw_pairs(self.config.objective, noises, StepRandom(0, last, num))  # [num]
        measured = []
        batches = zip(self._test_batches(), pairs.split(self.config.sample.batch_size), strict=True)
        for (latents, condition, _, eps), chosen in batches:
            measured.append(self.compared(latents, condition, eps, noises, chosen.to(latents.device))[:2])
        losses, distances = (torch.cat(column) for column in zip(*measured, strict=True))
        return {"loss": float(losses.mean()), "distance": float(distances.mean())}
