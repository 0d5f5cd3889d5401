"""The `eval` section of a YAML: what is measured, with which features, on how many images."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.config import TrainConfig

VARIANT_NAME = re.compile(r"(?!accept|step)[A-Za-z0-9][\w.+-]*")
REPRESENTATIONS = ("pixels", "tokenizer", "autoregressive", "autoregressive_random", "diffusion")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    path: str | None = None
    """Folder of a trained classifier, so that several runs share one judge; absent: one is trained into the run."""
    widths: tuple[int, int, int] = (32, 64, 96)
    """Channels at 1/2, 1/4 and 1/8 of the image size; multiples of 8."""
    shift: int = 2
    """Training images are moved by up to so many pixels."""
    seed: int = 0
    """Seed of weights and data order; apart from run.seed, so that runs with other seeds have the same judge."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=300, learning_rate=2e-3, weight_decay=0.02, warmup_steps=20, ema=0.98, log_every=100, preview_every=0
        )
    )
    """How the classifier is trained."""

    def __post_init__(self) -> None:
        if any(width < 8 or width % 8 for width in self.widths):
            raise ValueError(f"classifier.widths={list(self.widths)} must be multiples of 8")


@dataclass(frozen=True, kw_only=True)
class RejectionConfig:
    acceptances: tuple[float, ...] = ()
    """Also score the best share of candidates of each class, once for each share listed; 0.5 and 0.25 are usual.
    All candidates stay in samples/<family>-candidates: num_samples over the smallest share of them."""
    classifier: ClassifierConfig = field(default_factory=lambda: ClassifierConfig(widths=(40, 80, 120), seed=1))
    """The classifier that picks them: of other widths and another seed than eval.classifier, so that no score is
    circular. Both learn from the same images, so they err alike; fd_random is the judge that depends on neither."""

    def __post_init__(self) -> None:
        for acceptance in self.acceptances:
            check_acceptance("eval.rejection.acceptances", acceptance)
        if len(set(self.acceptances)) < len(self.acceptances):
            raise ValueError(f"eval.rejection.acceptances={list(self.acceptances)} names a share twice")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    families: tuple[str, ...] = REPRESENTATIONS
    """What is probed, as far as the run has it; pixels and autoregressive_random (untrained weights) are baselines."""
    taps: Literal["all"] | tuple[str, ...] = "all"
    """Names of the taps to probe in each family; all probes every one."""
    c_grid: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """Inverse penalties to choose from (scikit-learn's C)."""
    held_out: float = 0.1
    """Share of the training images on which penalty and tap are chosen."""
    num_train: int = 10_000
    """Training images at most; 0 takes all."""
    num_test: int = 0
    """Test images at most; 0 takes all."""

    def __post_init__(self) -> None:
        known = ", ".join(REPRESENTATIONS)
        if not self.families:
            raise ValueError(f"eval.probe.families is empty; name any of {known}")
        unknown = [family for family in self.families if family not in REPRESENTATIONS]
        if unknown:
            raise ValueError(f"eval.probe.families has {unknown[0]!r}; it takes any of {known}")
        if not self.c_grid or min(self.c_grid) <= 0:
            raise ValueError(f"eval.probe.c_grid={list(self.c_grid)} must hold at least one number, all above 0")
        if not 0 < self.held_out < 1:
            raise ValueError(f"eval.probe.held_out={self.held_out} must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    num_samples: int = 500
    """Images per generator, and as many real training images to hold them against."""
    features: tuple[str, ...] = ("classifier", "random")
    """Judges of images: classifier, inception, random, or timm:<model>:<weights file>[:<input size>]."""
    inception_weights: str | None = None
    """File of the FID Inception weights; absent: torch hub's checkpoint folder. Never downloaded."""
    lpips: Literal["auto", "none", "alex", "vgg", "squeeze"] = "auto"
    """LPIPS network; auto measures with each one whose trunk weights lie in torch hub's checkpoint folder."""
    batch_size: int = 128
    """Images per forward pass."""
    num_reconstructions: int = 0
    """Test images to reconstruct at most; 0 takes all."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """The classifier behind the classifier features and class_accuracy."""
    rejection: RejectionConfig = field(default_factory=RejectionConfig)
    """Rejection sampling: the best of the samples are scored beside all of them, under names of their own."""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Other ways to sample that are scored too: names, each with dotted keys such as diffusion.sample.guidance and
    their values. What cfg2 is of diffusion has the scores and samples diffusion@cfg2."""
    snapshots: bool = False
    """Score the snapshots of the training too (diffusion.train.snapshot_every), as diffusion@step<k>."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """The linear probe."""

    def __post_init__(self) -> None:
        for name, values in self.variants.items():
            _check_variant(name, values)
        if not self.features:
            raise ValueError("eval.features is empty; name at least one, such as random")
        if self.num_samples < 20:
            raise ValueError(f"eval.num_samples={self.num_samples} is too few for any interval; take at least 20")
        if self.batch_size < 1:
            raise ValueError(f"eval.batch_size={self.batch_size} must be at least 1")
        if self.rejection.acceptances and "classifier" in self.features and self._picks_as_it_judges:
            raise ValueError(
                "eval.rejection.classifier is the very one that judges (eval.classifier), so its scores would be "
                f"circular: use another --eval.rejection.classifier.seed, now {self.rejection.classifier.seed}, or path"
            )

    @property
    def _picks_as_it_judges(self) -> bool:
        picks, judges = self.rejection.classifier, self.classifier
        return picks.path == judges.path if picks.path or judges.path else picks == judges

    @property
    def main_features(self) -> str:
        """The features under kid, precision and recall: Inception where it is listed, else the first listed."""
        return "inception" if "inception" in self.features else self.features[0]


def _check_variant(name: str, values: dict[str, Any]) -> None:
    """Raise ValueError unless a variant has a name of its own and sets keys of one family's sampling."""
    where = f"eval.variants.{name}"
    if not VARIANT_NAME.fullmatch(name):
        raise ValueError(
            f"{where}: {name!r} cannot name samples: use letters, digits, and any of . + - _, and let it begin neither"
            " with accept nor with step, as subjects of rejection sampling and of snapshots do"
        )
    families = {key.split(".")[0] for key in values}
    wrong = [key for key in values if not re.match(r"(autoregressive|diffusion)\.sample\..", key)]
    if wrong or len(families) != 1:
        told = f"{wrong[0]!r} is no such key" if wrong else f"it has keys of {len(families)} families"
        raise ValueError(f"{where} takes keys such as diffusion.sample.guidance, all of one family, but {told}")


def check_acceptance(key: str, acceptance: float) -> None:
    """Raise ValueError unless a share of candidates lies between 0 and 1."""
    if not 0 < acceptance < 1:
        raise ValueError(f"{key}={acceptance} must lie between 0 and 1, as 0.25 does")
