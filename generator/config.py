"""The `autoregressive` and `diffusion` sections of an experiment. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

from engine.config import TrainConfig
from generator.align_config import AlignConfig, check_align
from generator.checks import check_at_least, check_choices, check_finite, check_scale, check_share
from generator.condition_config import CodesConditionConfig, ConditionConfig
from generator.consistency_config import ObjectiveConfig, check_objective
from generator.learned_config import LearnedScheduleConfig, check_learned

Section = TypeVar("Section")

# name: depth, width, heads. The VIM sizes are those of ViT-VQGAN (Yu et al., 2022; second-hand).
AUTOREGRESSIVE_PRESETS: dict[str, tuple[int, int, int]] = {
    "tiny":      (4, 128, 4),
    "mini":      (6, 256, 4),
    "small":     (12, 512, 8),
    "base":      (12, 768, 12),
    "vim-base":  (24, 1536, 16),
    "vim-large": (36, 2048, 32),
}  # fmt: skip

# name: depth, width, heads. S to XL are those of DiT (Peebles & Xie, 2023), table 1.
DENOISER_PRESETS: dict[str, tuple[int, int, int]] = {
    "tiny": (4, 128, 4),
    "mini": (6, 256, 4),
    "S":    (12, 384, 6),
    "B":    (12, 768, 12),
    "L":    (24, 1024, 16),
    "XL":   (28, 1152, 16),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AutoregressiveModelConfig:
    preset: Literal["tiny", "mini", "small", "base", "vim-base", "vim-large"] = "mini"
    """Depth, width and heads of the transformer; the three keys below replace single numbers of it."""
    depth: int | None = None
    """Number of blocks."""
    width: int | None = None
    """Channels of the residual stream."""
    heads: int | None = None
    """Attention heads."""
    mlp_ratio: int = 4
    """Hidden width of the MLP over the width."""
    dropout: float = 0.1
    """Dropout on residual branches, MLP activations and attention weights."""
    label_dropout: float = 0.1
    """Share of labels, texts or images that are hidden in training: needed for guidance; 1 trains without labels."""
    block: Literal["vim", "modern"] = "vim"
    """The published block (LayerNorm, GELU, biases), or a modern one: RMSNorm, SwiGLU, QK-norm, two-dimensional rotary
    positions, no biases."""

    def __post_init__(self) -> None:
        _check_transformer("autoregressive.model", self.shape, self.mlp_ratio)
        _, width, heads = self.shape
        if self.block == "modern" and width // heads % 4:
            raise ValueError(
                f"autoregressive.model.block=modern turns pairs of numbers by row and by column, but a head has"
                f" {width // heads} (width over heads): choose a multiple of 4, or block=vim"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"autoregressive.model.dropout={self.dropout} must lie in [0, 1)")
        check_share("autoregressive.model.label_dropout", self.label_dropout)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Depth, width, heads."""
        return _shape(self, AUTOREGRESSIVE_PRESETS[self.preset])


@dataclass(frozen=True, kw_only=True)
class AutoregressiveSampleConfig:
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest code."""
    top_k: int = 0
    """Keep so many of the likeliest codes; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest codes whose probabilities first sum to this; 1 keeps all."""
    guidance: float = 1.0
    """Classifier-free guidance scale; 1 switches guidance off and halves the work."""
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the scale rises from 1 towards guidance along the sequence; constant has the full scale throughout."""
    guidance_power: float = 1.0
    """Power of the share of codes that stand, inside the cosine schedule: above 1 guidance rises later."""
    guidance_start: float = 0.0
    """Share of the sequence at which guidance begins; codes before it are not guided."""
    guidance_stop: float = 1.0
    """Share of the sequence at which guidance ends; codes from it on are not guided and cost half."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of weights and activations while decoding; codes are drawn in fp32 either way. On a GPU fp32 multiplies in TF32,
    as in training. bf16 rounds so coarsely that batch_size and compile change many samples, so there they are part of
    what samples.json tells; it needs hardware that multiplies bf16."""
    batch_size: int = 64
    """Samples decoded together; changes speed and memory, never a sample's noise. In fp32 samples stay the same up to
    rounding; in bf16 many become others."""
    compile: bool = False
    """Compile the one-code step with torch.compile: pays off for a few rows at a time and many steps in one process."""

    def __post_init__(self) -> None:
        check_choices("autoregressive.sample", self)
        check_at_least("autoregressive.sample.temperature", self.temperature, 0)
        check_at_least("autoregressive.sample.top_k", self.top_k, 0)
        check_at_least("autoregressive.sample.guidance", self.guidance, 0)
        check_at_least("autoregressive.sample.batch_size", self.batch_size, 1)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"autoregressive.sample.top_p={self.top_p} must lie in (0, 1]; 1 keeps all codes")
        self._check_schedule()

    def _check_schedule(self) -> None:
        if not self.guidance_power > 0:
            raise ValueError(
                f"autoregressive.sample.guidance_power={self.guidance_power} must be above 0; 1 is the plain cosine"
            )
        if self.guidance_power != 1 and self.guidance_schedule != "cosine":
            raise ValueError(
                f"autoregressive.sample.guidance_power={self.guidance_power} needs guidance_schedule=cosine:"
                f" {self.guidance_schedule} has no power"
            )
        if not 0 <= self.guidance_start < self.guidance_stop <= 1:
            raise ValueError(
                f"autoregressive.sample.guidance_start={self.guidance_start} must lie below"
                f" guidance_stop={self.guidance_stop}, both in [0, 1]; 0 and 1 guide the whole sequence"
            )


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    kind: Literal["raster", "random"] = "raster"
    """Order in which training predicts the codes; random begins with random orders, which give way to the raster
    (RAR, Yu et al., 2024). Sampling is in raster order either way."""
    anneal_start: float = 0.5
    """Share of the training steps up to which every sample has a random order."""
    anneal_end: float = 0.75
    """Share of the training steps from which every sample has the raster order; in between, linear."""

    def __post_init__(self) -> None:
        if not 0 <= self.anneal_start <= self.anneal_end <= 1:
            raise ValueError(
                f"autoregressive.order.anneal_start={self.anneal_start} must be at most"
                f" anneal_end={self.anneal_end}, both in [0, 1]"
            )


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig:
    model: AutoregressiveModelConfig = field(default_factory=AutoregressiveModelConfig)
    condition: CodesConditionConfig = field(default_factory=CodesConditionConfig)
    """What the generator is told about an image."""
    codes: Literal["cached", "on_the_fly"] = "cached"
    """Train on the codes that `encode` wrote, or augment and encode the images of each step anew."""
    order: OrderConfig = field(default_factory=OrderConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(betas=(0.9, 0.96), weight_decay=0.045))
    sample: AutoregressiveSampleConfig = field(default_factory=AutoregressiveSampleConfig)

    def __post_init__(self) -> None:
        _check_condition("autoregressive", self)


@dataclass(frozen=True, kw_only=True)
class DenoiserModelConfig:
    preset: Literal["tiny", "mini", "S", "B", "L", "XL"] = "tiny"
    """Depth, width and heads of the transformer; the three keys below replace single numbers of it."""
    patch_size: int = 1
    """Side of the square of latents that makes one token; DiT-S/2 is preset S with 2."""
    depth: int | None = None
    """Number of blocks."""
    width: int | None = None
    """Channels of the residual stream."""
    heads: int | None = None
    """Attention heads."""
    mlp_ratio: int = 4
    """Hidden width of the MLP over the width."""
    label_dropout: float = 0.1
    """Share of labels, texts or images that are hidden in training: needed for guidance; 1 trains without labels."""
    qk_norm: bool = False
    """Normalise queries and keys in each head (RMSNorm)."""
    rope: bool = False
    """Turn queries and keys by row and column (rotary positions) beside the fixed positions of the patches."""
    swiglu: bool = False
    """SwiGLU in place of the MLP's GELU, at about the same number of weights."""

    def __post_init__(self) -> None:
        _check_transformer("diffusion.model", self.shape, self.mlp_ratio)
        check_at_least("diffusion.model.patch_size", self.patch_size, 1)
        check_share("diffusion.model.label_dropout", self.label_dropout)
        _, width, heads = self.shape
        if self.rope and width // heads % 4:
            raise ValueError(
                f"diffusion.model.rope turns pairs of numbers by row and by column, but a head has {width // heads}"
                " (width over heads): choose a multiple of 4, or rope=false"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Depth, width, heads."""
        return _shape(self, DENOISER_PRESETS[self.preset])


FixedScheduleKind = Literal["ddpm", "iddpm", "cosine", "laplace", "cauchy", "edm", "uniform_time", "logit_normal"]
ScheduleKind = Literal["ddpm", "iddpm", "cosine", "laplace", "cauchy", "edm", "uniform_time", "logit_normal", "learned"]


@dataclass(frozen=True, kw_only=True)
class MixedScheduleConfig:
    kind: FixedScheduleKind = "cosine"
    """As schedule.kind."""
    location: float | None = None
    """As schedule.location."""
    scale: float | None = None
    """As schedule.scale."""
    share: float = 0.1
    """Share of the draws that come from it."""

    def __post_init__(self) -> None:
        check_finite("diffusion.schedule.mixed", self)
        check_scale("diffusion.schedule.mixed.scale", self.scale)
        if not 0 < self.share < 1:
            raise ValueError(f"diffusion.schedule.mixed.share={self.share} must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    kind: ScheduleKind = "cosine"
    """Which log SNRs are trained on, and how often: those of linear DDPM or of iDDPM's cosine, both of 1,000 steps, the
    plain cosine, Laplace, Cauchy, EDM's normal, uniform (FM-OT) or logit-normal times of the linear flow; or a schedule
    that is learned along with the network (CVDM, della Maggiora et al., 2024)."""
    location: float | None = None
    """Centre in log SNR, the kind's own if absent; cosine with a location is the shifted cosine. A logit-normal mean m
    of the flow time is -2 m here; ddpm and iddpm are moved by it."""
    scale: float | None = None
    """Stretch in log SNR, the kind's own if absent: Laplace's b, Cauchy's gamma; 1 / s for the scaled cosine. A
    logit-normal deviation s of the flow time is 2 s here; ddpm and iddpm are stretched by it."""
    zero_terminal: bool = False
    """Rescale ddpm or iddpm so that their last step has no signal at all (Lin et al., 2024)."""
    mixed: MixedScheduleConfig | None = None
    """A second schedule, from which a share of the draws comes."""
    learned: LearnedScheduleConfig = field(default_factory=LearnedScheduleConfig)
    """The schedule of kind=learned."""

    def __post_init__(self) -> None:
        check_finite("diffusion.schedule", self)
        check_scale("diffusion.schedule.scale", self.scale)
        if self.zero_terminal and self.kind not in ("ddpm", "iddpm"):
            raise ValueError(
                "diffusion.schedule.zero_terminal rescales the last step of ddpm and iddpm, but"
                f" kind={self.kind} has no last step: leave it out"
            )
        if self.kind != "learned" and self.learned != LearnedScheduleConfig():
            raise ValueError(
                f"diffusion.schedule.learned has no effect with kind={self.kind}: set diffusion.schedule.kind=learned"
            )
        for name in ("location", "scale", "mixed"):
            if self.kind == "learned" and getattr(self, name) is not None:
                raise ValueError(f"diffusion.schedule.{name} has no place in kind=learned: leave it out")


STAGED = ("easy_to_hard", "anti")  # curricula that go through the clusters stage by stage
# Keys of a curriculum and the kinds that read them; the others are read by all.
CURRICULUM_KEYS: dict[str, tuple[str, ...]] = {
    "pacing": STAGED, "patience": STAGED, "smoothing": STAGED, "min_improvement": STAGED, "stage_steps": STAGED,
    "threshold": ("asymmetric",), "ratio": ("asymmetric",),
    "cluster": ("single",), "start": ("progressive",), "end": ("progressive",),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    kind: Literal["uniform", "easy_to_hard", "anti", "asymmetric", "progressive", "single"] = "uniform"
    """Which part of the schedule is trained now. uniform: all of it throughout. easy_to_hard: the noisiest cluster,
    then one more in each stage until all are in (Kim et al., 2025). anti: the same from the least noisy on. asymmetric:
    all of it, the less noisy times more often (SpeeD, Wang et al., 2025). progressive: a schedule that moves. single:
    one cluster throughout, for a network that serves its levels alone (sample.outside)."""
    num_clusters: int = 20
    """Parts of the noise axis, which stages add one by one, and by which the loss is logged."""
    clusters: Literal["time", "logsnr", "noise_level"] = "time"
    """How the axis is divided: into equal parts of the schedule's own time, so that all are drawn equally often; such
    that the log SNRs of a cluster lie close together (Go et al., 2023); or into equal parts of linear-flow time."""
    pacing: Literal["patience", "fixed"] = "patience"
    """When the next stage begins: once the loss has not improved for more than `patience` steps, or after stage_steps
    steps."""
    patience: int = 200
    """Steps without improvement that a stage bears."""
    smoothing: float = 0.99
    """Decay of the average of the loss that patience looks at; 0 takes each step's own loss."""
    min_improvement: float = 0.0
    """By how much the loss must fall below its best to count as improved."""
    stage_steps: int | None = None
    """Steps of each stage with pacing=fixed; the most that a stage takes with patience, where absent is no limit."""
    threshold: float = 0.7
    """Asymmetric: the time, 0 data and 1 noise, below which times are drawn more often."""
    ratio: float = 2.0
    """Asymmetric: how many times more often, before half of the draws are mirrored."""
    cluster: int = 1
    """Single: the cluster that is trained, from 1, the least noise, to num_clusters."""
    start: float = 2.0
    """Progressive: log SNR by which the schedule is moved at the first step."""
    end: float = -2.0
    """Progressive: log SNR by which it is moved at the last step; linear in between. Below start noise grows."""

    def __post_init__(self) -> None:
        check_choices("diffusion.curriculum", self)
        check_finite("diffusion.curriculum", self)
        standard = {each.name: each.default for each in fields(self)}
        for name, kinds in CURRICULUM_KEYS.items():
            if self.kind not in kinds and getattr(self, name) != standard[name]:
                raise ValueError(
                    f"diffusion.curriculum.{name}={getattr(self, name)} has no effect with kind={self.kind}: set"
                    f" diffusion.curriculum.kind={' or '.join(kinds)}"
                )
        check_at_least("diffusion.curriculum.num_clusters", self.num_clusters, 1)
        if self.num_clusters > 100:
            raise ValueError(f"diffusion.curriculum.num_clusters={self.num_clusters} must be at most 100")
        if not 1 <= self.cluster <= self.num_clusters:
            raise ValueError(
                f"diffusion.curriculum.cluster={self.cluster} must be one of 1 .. {self.num_clusters} (num_clusters)"
            )
        check_at_least("diffusion.curriculum.patience", self.patience, 0)
        check_at_least("diffusion.curriculum.min_improvement", self.min_improvement, 0)
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"diffusion.curriculum.smoothing={self.smoothing} must lie in [0, 1); 0 is the raw loss")
        if not 0 < self.threshold < 1:
            raise ValueError(f"diffusion.curriculum.threshold={self.threshold} must lie between 0 and 1")
        if not self.ratio > 0:
            raise ValueError(
                f"diffusion.curriculum.ratio={self.ratio} must be positive: above 1 for more draws below"
                " diffusion.curriculum.threshold"
            )
        self._check_pacing()

    def _check_pacing(self) -> None:
        if self.stage_steps is not None:
            check_at_least("diffusion.curriculum.stage_steps", self.stage_steps, 1)
        if self.pacing == "patience":
            return
        if self.stage_steps is None:
            raise ValueError("diffusion.curriculum.pacing=fixed needs diffusion.curriculum.stage_steps, their length")
        standard = {each.name: each.default for each in fields(self)}
        for name in ("patience", "smoothing", "min_improvement"):
            if getattr(self, name) != standard[name]:
                raise ValueError(
                    f"diffusion.curriculum.{name}={getattr(self, name)} has no effect with pacing=fixed: set"
                    " diffusion.curriculum.pacing=patience"
                )

    @property
    def least_steps(self) -> int:
        """Steps after which the last stage, the whole schedule, can begin at the earliest."""
        if self.kind not in STAGED:
            return 0
        if self.pacing == "fixed":
            return (self.num_clusters - 1) * (self.stage_steps or 0)
        # The first loss of a stage is always its best so far.
        each = self.patience + 2 if self.stage_steps is None else min(self.patience + 2, self.stage_steps)
        return (self.num_clusters - 1) * each


@dataclass(frozen=True, kw_only=True)
class DiffusionSampleConfig:
    solver: Literal["ddpm", "ddim", "euler", "heun", "dpmpp_2m", "sde_dpmpp_2m", "euler_maruyama", "consistency"] = (
        "ddim"
    )
    """How to go from noise to latents: ancestral DDPM; DDIM with its eta; Euler and Heun along the linear flow's ODE;
    DPM-Solver++(2M) and its stochastic form; Euler-Maruyama along the linear flow's SDE. heun and dpmpp_2m are of
    second order; heun alone calls the network twice a step. consistency, of objective.kind=consistency, goes to the end
    in each step and back to the next level with fresh noise."""
    num_steps: int = 50
    """Steps of the solver; steps=list has as many as it names."""
    steps: Literal[
        "cosine", "flow", "time", "logsnr", "karras", "list", "aligned", "sd15", "sdxl", "deepfloyd", "svd"
    ] = "cosine"
    """Where the solver stops: at equal distances in cosine time, in linear-flow time, in the training schedule's own
    time (where a curriculum has moved it in the end), in log SNR, in EDM's sigma^(1 / rho), or at `levels`; aligned:
    where `tokenloom steps` has found it best for the trained network (Align Your Steps; until then previews take
    karras); or where this was published for Stable Diffusion 1.5 or XL, DeepFloyd, or Stable Video
    Diffusion."""
    first_logsnr: float = -10.0
    """Log SNR at which sampling starts from pure noise; steps list, aligned and the published ones start at their own
    first. Where it is left at -10, solver=consistency starts at objective.sigma_max."""
    from_zero_snr: bool = False
    """Start where there is no signal at all instead of at first_logsnr, for a network that was trained there
    (schedule.zero_terminal); steps cosine, flow, time and list have such a level."""
    last_logsnr: float = 10.0
    """Log SNR of the last network call with steps logsnr, karras; the others space themselves down to clean latents."""
    rho: float = 7.0
    """Exponent of steps=karras; larger ones put more steps where there is little noise."""
    levels: tuple[float, ...] = ()
    """The log SNRs of steps=list, rising."""
    eta: float = 0.0
    """Share of fresh noise in each step of ddim: 0 is deterministic, 1 is ancestral sampling."""
    guidance: float = 1.0
    """Guidance scale; 1 switches guidance off and halves the work. Classifier-free, unless `guide` names a network."""
    guidance_first: float | None = None
    """Log SNR from which samples are guided; steps below it are not, and cost half. Absent: from the start."""
    guidance_last: float | None = None
    """Log SNR up to which samples are guided; steps above it are not, and cost half. Absent: to the end."""
    guidance_rescale: float = 0.0
    """Share of the way back to the deviation that x0 has without guidance (Lin et al., 2024: 0.7)."""
    guide: str | None = None
    """Autoguidance (Karras et al., 2024): a weaker network that guides in place of the null label. A folder of a
    diffusion model of the same tokenizer, or `step-<k>`, a snapshot of the run itself."""
    outside: str | None = None
    """Folder of a diffusion model of the same tokenizer that serves the noise levels outside of the cluster which this
    one was trained on (curriculum.kind=single)."""
    snapshot: int | None = None
    """Training step whose snapshot samples; absent: the trained model."""
    ema_width: float | None = None
    """Width (sigma_rel) of an average of the weights that is reconstructed from the snapshots after training; absent:
    the averaged weights of the model."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the network's matrix products while sampling; the solver computes in fp32 either way. bf16 rounds so coarsely
    that batch_size changes images a little; it needs hardware that multiplies bf16."""
    batch_size: int = 64
    """Samples denoised together; changes speed and memory, never a sample's noise."""

    def __post_init__(self) -> None:
        check_choices("diffusion.sample", self)
        check_finite("diffusion.sample", self, "; from_zero_snr=true starts without any signal")
        check_at_least("diffusion.sample.num_steps", self.num_steps, 1)
        if not self.first_logsnr < self.last_logsnr:
            raise ValueError(
                f"diffusion.sample.first_logsnr={self.first_logsnr} must lie below last_logsnr={self.last_logsnr}"
            )
        if not 0 <= self.eta <= 1:
            raise ValueError(f"diffusion.sample.eta={self.eta} must lie in [0, 1]")
        if self.eta and self.solver != "ddim":
            raise ValueError(f"diffusion.sample.eta={self.eta} needs solver=ddim: {self.solver} has no eta")
        check_at_least("diffusion.sample.guidance", self.guidance, 0)
        check_at_least("diffusion.sample.batch_size", self.batch_size, 1)
        check_share("diffusion.sample.guidance_rescale", self.guidance_rescale)
        if self.guidance_first is not None and self.guidance_last is not None:
            if not self.guidance_first < self.guidance_last:
                raise ValueError(
                    f"diffusion.sample.guidance_first={self.guidance_first} must lie below"
                    f" guidance_last={self.guidance_last}"
                )
        if self.guide is not None and self.guidance == 1:
            raise ValueError(
                f"diffusion.sample.guide={self.guide!r} changes nothing at guidance=1: set another one, or guide=null"
            )
        if self.ema_width is not None and not 0 < self.ema_width < 0.28:
            raise ValueError(f"diffusion.sample.ema_width={self.ema_width} must lie between 0 and 0.28")
        self._check_steps()

    @property
    def previewed(self) -> DiffusionSampleConfig:
        """How previews of the training sample, when no levels have been optimised yet."""
        return replace(self, steps="karras") if self.steps == "aligned" else self

    def _check_steps(self) -> None:
        if (self.steps == "list") != bool(self.levels):
            raise ValueError(
                f"diffusion.sample.levels={list(self.levels)} with steps={self.steps}: steps=list needs levels, and no"
                " other steps has them"
            )
        if any(not low < high for low, high in zip(self.levels, self.levels[1:], strict=False)):
            raise ValueError(f"diffusion.sample.levels={list(self.levels)} must rise from noise to data")
        if not self.rho > 0:
            raise ValueError(f"diffusion.sample.rho={self.rho} must be positive")
        if self.rho != 7 and self.steps != "karras":
            raise ValueError(f"diffusion.sample.rho={self.rho} has no effect with steps={self.steps}: it is of karras")
        if self.from_zero_snr and self.steps not in ("cosine", "flow", "time", "list"):
            raise ValueError(f"diffusion.sample.from_zero_snr has no place in steps={self.steps}: use cosine or flow")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    model: DenoiserModelConfig = field(default_factory=DenoiserModelConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    """What the generator is told about an image."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What the network is trained for."""
    path: Literal["vp", "flow", "gvp", "ve"] = "vp"
    """How signal and noise mix: variance preserving; a straight line between them; vp with the quarter circle as its
    time; or variance exploding with EDM's scaled input."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Which noise levels are trained on."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    """Which part of the schedule is trained when."""
    target: Literal["v", "velocity", "eps", "x0", "F"] = "v"
    """What the network predicts; velocity is the path's own derivative, F the output of EDM's preconditioning."""
    weight: Literal["plain", "min_snr", "soft_min_snr", "p2", "edm", "learned"] = "plain"
    """How much each noise level counts in the loss, beside how often the schedule draws it; learned fits an uncertainty
    to each level (Karras et al., 2024)."""
    weight_gamma: float | None = None
    """Gamma of min_snr and soft_min_snr, 5 if absent, or of p2, 1 if absent."""
    sigma_data: float = 1.0
    """Standard deviation of the latents in the preconditioning of EDM and of consistency models, and in EDM's weight;
    tokenizers normalise it to 1."""
    align: AlignConfig | None = None
    """Optimise where a solver stops as soon as the network is trained, for sample.steps=aligned; absent: only when
    `tokenloom steps` is called."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=5e-4))
    sample: DiffusionSampleConfig = field(default_factory=DiffusionSampleConfig)

    def __post_init__(self) -> None:
        check_finite("diffusion", self)
        _check_condition("diffusion", self)
        if not self.sigma_data > 0:
            raise ValueError(f"diffusion.sigma_data={self.sigma_data} must be positive")
        edm = self.path == "ve" or self.target == "F" or self.weight == "edm"
        if self.sigma_data != 1 and not (edm or self.objective.kind == "consistency"):
            raise ValueError(
                f"diffusion.sigma_data={self.sigma_data} has no effect with path={self.path}, target={self.target},"
                f" weight={self.weight}: it is of path=ve, target=F, weight=edm and objective.kind=consistency"
            )
        check_objective(self)
        if self.weight_gamma is not None and self.weight not in ("min_snr", "soft_min_snr", "p2"):
            raise ValueError(f"diffusion.weight_gamma={self.weight_gamma} has no effect with weight={self.weight}")
        if self.weight_gamma is not None and not self.weight_gamma > 0:
            raise ValueError(f"diffusion.weight_gamma={self.weight_gamma} must be positive")
        if self.curriculum.least_steps >= self.train.steps:
            raise ValueError(
                f"diffusion.curriculum needs at least {self.curriculum.least_steps} steps before the whole schedule is"
                f" trained, but diffusion.train.steps={self.train.steps}: lower patience, stage_steps or num_clusters"
                f" (here {self.curriculum.num_clusters}), or train longer"
            )
        if self.sample.outside is not None and self.curriculum.kind != "single":
            raise ValueError(
                f"diffusion.sample.outside={self.sample.outside!r} has no effect with curriculum.kind="
                f"{self.curriculum.kind}: such a network serves all noise levels itself"
            )
        if self.schedule.kind == "learned":
            check_learned(self)
        if self.align is not None:
            check_align(self)
        noise = self.target == "eps" or (self.target == "velocity" and self.path == "ve")  # by either name
        if noise and (self.schedule.zero_terminal or self.sample.from_zero_snr):
            key = "schedule.zero_terminal" if self.schedule.zero_terminal else "sample.from_zero_snr"
            raise ValueError(
                f"diffusion.{key}=True with target={self.target}, path={self.path}: the noise says nothing of the image"
                " where there is no signal; use target=v"
            )


def read_settings(kind: type[Section], key: str, settings: dict[str, Any]) -> Section:
    """A section from the settings of a call; `key` is its place in a YAML.

    Raises:
        ValueError: an unknown setting, or a value that the section refuses.
    """
    known = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ValueError(f"{key}.{unknown[0]}={settings[unknown[0]]!r} is no setting; there are {', '.join(known)}")
    return kind(**settings)


def _check_condition(family: str, config: Any) -> None:
    if config.condition.kind == "text" and config.model.label_dropout == 1:
        raise ValueError(
            f"{family}.model.label_dropout=1 would hide every text from a generator with condition.kind=text: set it"
            " below 1, or kind=class"
        )


def _shape(config: Any, preset: tuple[int, int, int]) -> tuple[int, int, int]:
    given = (config.depth, config.width, config.heads)
    depth, width, heads = (standard if value is None else value for value, standard in zip(given, preset, strict=True))
    return depth, width, heads


def _check_transformer(key: str, shape: tuple[int, int, int], mlp_ratio: int) -> None:
    for name, value in zip(("depth", "width", "heads", "mlp_ratio"), (*shape, mlp_ratio), strict=True):
        check_at_least(f"{key}.{name}", value, 1)
    _, width, heads = shape
    if width % heads:
        raise ValueError(f"{key}.width={width} must be a multiple of {key}.heads={heads}")
