"""Latent diffusion: the generator around a trained denoiser.

Training draws noise levels from a schedule; sampling asks the same network for x0 at the levels where a solver stops.
Both speak in log SNR alone, so schedule, path, target, weight, solver and steps are chosen independently. Solvers and
guidance see z = alpha x0 + sigma eps, variance preserving; the objective alone knows what the network sees and means.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.device import check_sampling_precision
from generator.aligned_steps import AlignedSteps
from generator.condition import check_guidance, condition_config, condition_of
from generator.config import (
    CurriculumConfig,
    DenoiserModelConfig,
    DiffusionSampleConfig,
    MixedScheduleConfig,
    ScheduleConfig,
    read_settings,
)
from generator.consistency import build_objective, objective_config
from generator.consistency_config import check_last, check_sampling, first_level
from generator.curriculum import Curriculum, final_schedule
from generator.denoiser import DiT
from generator.guidance import ConditionalDenoise, guided
from generator.learned_config import LearnedScheduleConfig, check_map_sampling
from generator.learned_sampling import solve_map
from generator.learned_schedule import LearnedSchedule
from generator.path import noised
from generator.schedule import Schedule, build_schedule
from generator.solvers import Denoise, SampleNoise, solve
from generator.steps import solver_levels
from generator.text import build_text_encoder

FEATURE_LOGSNR = 2.0  # a little noise: less than the latents' own deviation, enough to make the network work


class Diffusion(nn.Module):
    """A denoiser with all that sampling needs; `card` is what `train_generator` writes beside the weights.

    `guide` is the weaker network of autoguidance, which whoever loads the generator attaches; it acts on samples whose
    settings name a guide, whatever the name. `outside` likewise is the network that serves the noise levels outside of
    the cluster which this one was trained on alone, and `aligned` holds the steps that were optimised for this one.
    """

    family = "diffusion"

    def __init__(self, network: DiT, card: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.card = network, card
        self.objective = build_objective(card["config"])
        self.condition = condition_of(card)
        self.guide: Diffusion | None = None
        self.outside: Diffusion | None = None
        self.aligned: AlignedSteps | None = None
        self.label_dropout: float = card["config"]["model"]["label_dropout"]
        self.num_classes: int = card["num_classes"]
        self.class_names = tuple(card["class_names"])
        self.tokenizer_fingerprint: str = card["tokenizer_fingerprint"]
        self.fingerprint: str = card.get("fingerprint", "")
        self.taps = tuple(f"block{number}" for number in range(1, len(network.blocks) + 1))

    @classmethod
    def from_card(cls, card: dict[str, Any], weights: dict[str, Tensor]) -> Diffusion:
        """Rebuild a saved generator, in eval mode."""
        network = build_denoiser(DenoiserModelConfig(**card["config"]["model"]), card)
        network.load_state_dict(weights)
        return cls(network, card).eval().requires_grad_(False)

    def denoise(self, z: Tensor, logsnr: Tensor, condition: Tensor) -> Tensor:
        """Estimate of the clean latents x0 [B, C, h, w] from z = alpha x0 + sigma eps, the solvers' variable; fp32."""
        output = self.network(self.objective.network_input(z, logsnr), logsnr, condition).to(z.dtype)
        return self.objective.to_x0(output, z, logsnr)

    def denoise_within(self, outside: Diffusion) -> ConditionalDenoise:
        """`denoise` of this network at the levels that it serves, of the other one at all others.

        All rows of a batch must be at one level.
        """
        low, high = served_levels(self.card)

        def denoise(z: Tensor, logsnr: Tensor, condition: Tensor) -> Tensor:
            return (self if low <= float(logsnr[0]) < high else outside).denoise(z, logsnr, condition)

        return denoise

    @property
    def companions(self) -> dict[str, Diffusion]:
        """The other networks that are attached, by the key of the sample section that names each."""
        return {key: other for key in ("guide", "outside") if (other := getattr(self, key)) is not None}

    @torch.inference_mode()
    def sample(self, condition: Any, seeds: Sequence[int], **settings: Any) -> Tensor:
        """Latents float32 [B, C, h, w], one for each seed; row k depends on seed k and row k of the condition alone.

        Args:
            condition: as the generator was trained: labels int64 [B] in 0 .. num_classes - 1, where -1 is no class; B
                texts, or their ids; or latents float32 [B, C, h, w] of smaller images. None samples without any.
            seeds: B integers.
            settings: keys of DiffusionSampleConfig. `snapshot` and `ema_width` say which weights to load, so that here
                it is too late for them: they change nothing.

        Raises:
            ValueError: a condition that does not fit, a setting out of range, or one that this network was not trained
                for or lacks the other network for.
        """
        chosen = read_settings(DiffusionSampleConfig, "diffusion.sample", settings)
        self.check_settings(chosen)
        return self.sample_rows(self.condition.rows(condition, len(seeds)), seeds, chosen)

    @torch.inference_mode()
    def sample_rows(self, rows: Tensor, seeds: Sequence[int], chosen: DiffusionSampleConfig) -> Tensor:
        """As `sample`, under settings that have been checked and for rows [B, ...] of the condition itself."""
        device = self.network.positions.device
        rows = rows.to(device)
        noise = SampleNoise(seeds, self.network.latent_shape, device=device)
        check_sampling_precision(self.family, chosen.precision, device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=chosen.precision == "bf16"):
            denoise = self.denoiser(rows, chosen)
            if self.level_maps:
                return self._solve_map(denoise, noise, rows, chosen)
            levels, rest = self.levels(chosen), self.objective.rest
            return solve(denoise, noise, levels, solver=chosen.solver, eta=chosen.eta, rest=rest)

    @property
    def level_maps(self) -> LearnedSchedule | None:
        """The learned schedule, if levels differ within an image."""
        return self.learned_schedule if self.learned_schedule and self.learned_schedule.is_map else None

    @property
    def learned_schedule(self) -> LearnedSchedule | None:
        """The schedule that the network was trained along with, if it was."""
        return getattr(self.network, "learned_schedule", None)

    def _solve_map(self, denoise: Denoise, noise: SampleNoise, rows: Tensor, settings: DiffusionSampleConfig) -> Tensor:
        """Latents [B, C, h, w] by the levels that the schedule has for these rows of the condition."""
        schedule = self.level_maps
        assert schedule is not None
        rates = schedule.rates(rows)

        def levels_at(time: float) -> Tensor:
            return schedule.logsnr(torch.full((len(rows),), time, device=rows.device), rates)

        eta = 1.0 if settings.solver == "ddpm" else settings.eta
        return solve_map(denoise, noise, levels_at, num_steps=settings.num_steps, eta=eta)

    def denoiser(self, rows: Tensor, chosen: DiffusionSampleConfig) -> Denoise:
        """The estimate of x0 that samples are drawn with: guided, of all attached networks that the settings name.

        All rows [B, ...] of the condition must be at one level.
        """
        guide, outside = self._guide_of(chosen), self._outside_of(chosen)
        null = self.condition.null(1).to(rows.device)
        if not (guide or outside):  # which read texts by themselves
            rows, null = self.network.read(rows), self.network.read(null)
        return guided(
            self.denoise_within(outside) if outside else self.denoise,
            rows,
            null=null.expand(len(rows), *null.shape[1:]),
            scale=chosen.guidance,
            first=chosen.guidance_first,
            last=chosen.guidance_last,
            rescale=chosen.guidance_rescale,
            guide=guide.denoise if guide else None,
        )

    def levels(self, settings: DiffusionSampleConfig) -> Tensor:
        """The log SNRs at which these settings ask the network, rising, float64 [n]."""
        return solver_levels(
            settings.steps,
            settings.num_steps,
            first=first_level(objective_config(self.card["config"]), settings),
            last=settings.last_logsnr,
            rho=settings.rho,
            listed=settings.levels,
            aligned=self.aligned.usable() if self.aligned and settings.steps == "aligned" else (),
            schedule=self._trained_schedule() if settings.steps == "time" else None,
            from_zero_snr=settings.from_zero_snr,
        )

    def _trained_schedule(self) -> Schedule:
        learned = self.learned_schedule
        return trained_schedule(self.card) if learned is None else learned.as_schedule()

    def check_settings(self, settings: DiffusionSampleConfig) -> None:
        """Raise ValueError if this network was not trained for what the settings ask of it, or they leave no steps."""
        objective = objective_config(self.card["config"])
        check_sampling(objective, settings)
        if self.level_maps:
            check_map_sampling(self.level_maps.config.per, settings)
        else:
            check_last(objective, settings, float(self.levels(settings)[-1]))
        if settings.guide is None:
            check_guidance(
                self.family, settings.guidance, guidable=self.condition.guidable, label_dropout=self.label_dropout
            )
        if settings.from_zero_snr and not self._speaks_without_signal:
            raise ValueError(
                "diffusion.sample.from_zero_snr starts without any signal, where this generator's target says nothing"
                " of the image: leave it out, or train with diffusion.target=v"
            )

    @property
    def _speaks_without_signal(self) -> bool:
        """Whether the target tells x0 from noise alone."""
        return bool(self.objective.gain(torch.tensor([-math.inf], device="cpu")).isfinite())

    def _guide_of(self, settings: DiffusionSampleConfig) -> Diffusion | None:
        """The attached guide if the settings want one; raise ValueError if it is missing or of another kind."""
        if settings.guide is None:
            return None
        named = f"diffusion.sample.guide={settings.guide!r}"
        if self.guide is None:
            raise ValueError(f"{named} is not attached to this generator: load it with load_generator(..., guide=...)")
        _check_alike(self.card, self.guide.card, named, "guide")
        if settings.from_zero_snr and settings.guidance_first is None and not self.guide._speaks_without_signal:
            raise ValueError(
                f"{named} has a target that says nothing of the image without any signal, where"
                " diffusion.sample.from_zero_snr starts: choose another guide, or set guidance_first"
            )
        return self.guide

    def _outside_of(self, settings: DiffusionSampleConfig) -> Diffusion | None:
        """The attached outside network if the settings want one; raise ValueError if it is missing or does not fit."""
        if settings.outside is None:
            return None
        if self.outside is None:
            raise ValueError(
                f"diffusion.sample.outside={settings.outside!r} is not attached to this generator: load it with"
                " load_generator(..., outside=...)"
            )
        check_outside(self.card, self.outside, settings)
        return self.outside

    @torch.no_grad()
    def features(self, latents: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        """Tokens averaged, float32 [B, D] under each tap: `block<n>`, from 1, is after block n.

        The latents [B, C, h, w] carry a little noise: FEATURE_LOGSNR, or l if the tap is `block<n>@logsnr=<l>`. They
        meet no condition, so that no class leaks, and one fixed noise, so that no row depends on the others. Each log
        SNR takes one pass, as far as the deepest of its blocks.

        Raises:
            ValueError: an unknown tap, or latents of another shape.
        """
        asked = {tap: self._parse_tap(tap) for tap in taps}
        self.network.check_latents(latents)
        pooled = {}
        for level in {level for _, level in asked.values()}:
            depths = {depth for depth, at in asked.values() if at == level}
            for depth, tokens in zip(range(1, max(depths) + 1), self._streams(latents, level), strict=False):
                if depth in depths:
                    pooled[depth, level] = tokens.float().mean(1)
        return {tap: pooled[at] for tap, at in asked.items()}

    def _streams(self, latents: Tensor, level: float) -> Iterator[Tensor]:
        """Tokens [B, T, D] after each block, of latents at a log SNR."""
        logsnr = latents.new_full((len(latents),), level)  # [B]
        eps = SampleNoise([0], self.network.latent_shape, device=latents.device)()
        seen = self.objective.network_input(noised(latents, eps, logsnr), logsnr)
        return self.network.activations(seen, logsnr, self.condition.null(len(latents)).to(latents.device))

    def _parse_tap(self, tap: str) -> tuple[int, float]:
        """Number of blocks to run, and log SNR."""
        block, at, level = tap.partition("@logsnr=")
        try:
            found = self.taps.index(block) + 1, float(level) if at else FEATURE_LOGSNR
        except ValueError:
            found = 0, math.nan
        if not math.isfinite(found[1]):
            known = f"{self.taps[0]} .. {self.taps[-1]}, or block<n>@logsnr=<number>"
            raise ValueError(f"tap={tap!r} is unknown: use {known}")
        return found


def check_outside(card: dict[str, Any], outside: Diffusion, settings: DiffusionSampleConfig) -> None:
    """Raise ValueError unless `outside` can serve the noise levels outside of the cluster that this card's model knows.

    `settings` name it and say how the two sample.
    """
    named, curriculum = f"diffusion.sample.outside={settings.outside!r}", trained_curriculum(card)
    if curriculum.kind != "single":
        raise ValueError(
            f"{named} has no effect with curriculum.kind={curriculum.kind}: this generator serves all noise levels"
            " itself; set outside=null"
        )
    _check_alike(card, outside.card, named, "model")
    if settings.guide is None and settings.guidance != 1 and not (outside.condition.guidable and outside.label_dropout):
        raise ValueError(
            f"{named} learned no null condition for diffusion.sample.guidance={settings.guidance} to compare with: use"
            " guidance=1, or a model with label_dropout above 0"
        )
    noisiest = curriculum.cluster == curriculum.num_clusters
    if settings.from_zero_snr and not noisiest and not outside._speaks_without_signal:
        raise ValueError(
            f"{named} has a target that says nothing of the image without any signal, where"
            " diffusion.sample.from_zero_snr starts: choose another model, or leave from_zero_snr out"
        )


def _check_alike(card: dict[str, Any], other: dict[str, Any], named: str, role: str) -> None:
    """Raise ValueError unless two cards name the same tokenizer, latents, classes and condition."""
    smaller = [each.get("low_resolution") for each in (card, other)]
    if condition_config(card) != condition_config(other) or smaller[0] != smaller[1]:
        raise ValueError(
            f"{named} was trained with another diffusion.condition, or smaller images, than this generator: choose a"
            f" {role} with the same"
        )
    kind, wanted = (objective_config(each["config"]).kind for each in (other, card))
    if kind != wanted:
        raise ValueError(f"{named} has diffusion.objective.kind={kind}, this generator {wanted}: choose a {role} alike")
    for key in ("tokenizer_fingerprint", "latent_shape", "class_names"):
        if list(card[key]) != list(other[key]):
            raise ValueError(
                f"{named} has {key}={other[key]}, this generator {card[key]}: choose a {role} of the same tokenizer and"
                " classes"
            )


def build_denoiser(model: DenoiserModelConfig, card: dict[str, Any]) -> DiT:
    """The network for the latent shape and number of classes that a card names."""
    depth, width, heads = model.shape
    channels = card["latent_shape"][0]
    schedule = schedule_config(card)
    mapped = schedule.kind == "learned" and schedule.learned.per != "scalar"
    condition = condition_config(card)
    network = DiT(
        tuple(card["latent_shape"]),
        depth=depth,
        width=width,
        heads=heads,
        patch_size=model.patch_size,
        num_classes=card["num_classes"],
        mlp_ratio=model.mlp_ratio,
        qk_norm=model.qk_norm,
        rope=model.rope,
        swiglu=model.swiglu,
        image_channels=channels if condition.kind == "image" else 0,
        level_channels=channels if mapped else 0,
        text=build_text_encoder(condition.text, width) if condition.kind == "text" else None,
    )
    if schedule.kind == "learned":
        told_image = condition.kind == "image"
        network.learned_schedule = LearnedSchedule(schedule.learned, card["latent_shape"], told_image=told_image)
    return network


def trained_schedule(card: dict[str, Any]) -> Schedule:
    """The training schedule that a card names, where its curriculum ends; of a learned one its own time."""
    return final_schedule(trained_curriculum(card), build_schedule(schedule_config(card)))


def schedule_config(card: dict[str, Any]) -> ScheduleConfig:
    """The section `schedule` that a card tells; the defaults if it tells none."""
    told = dict(card.get("config", {}).get("schedule", {}))
    if told.get("mixed"):
        told["mixed"] = MixedScheduleConfig(**told["mixed"])
    return ScheduleConfig(**{**told, "learned": LearnedScheduleConfig(**told.get("learned", {}))})


def served_levels(card: dict[str, Any]) -> tuple[float, float]:
    """low <= log SNR < high of the one cluster that the model of a card was trained on.

    The noisiest cluster serves all noisier levels too, the least noisy one all less noisy ones.
    """
    config = trained_curriculum(card)
    low, high = Curriculum(config, trained_schedule(card), steps=1).active_levels(0)
    return -math.inf if config.cluster == config.num_clusters else low, math.inf if config.cluster == 1 else high


def trained_curriculum(card: dict[str, Any]) -> CurriculumConfig:
    """The curriculum that a card names."""
    return CurriculumConfig(**card["config"].get("curriculum", {}))
